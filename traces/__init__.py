"""What happened: the call model, the Parquet format, importers and synthetic workloads."""
