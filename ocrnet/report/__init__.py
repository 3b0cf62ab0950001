"""`ocrnet report`: a run as one HTML file and a model card; several runs side by side."""
