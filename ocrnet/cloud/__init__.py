"""Object stores and shared folders: data and weights come from them, what a run writes goes to them."""
