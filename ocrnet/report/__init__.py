"""`ocrnet report`: one run as an HTML file and a model card, or several runs as an HTML comparison."""
