"""What a run records: appended to a spool on the disk, sent to MLflow from there."""
