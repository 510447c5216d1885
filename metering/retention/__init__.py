"""Old raw events: exported to Parquet, taken out of the database, and read from the export ever after."""
