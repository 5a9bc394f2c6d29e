"""Objects in a bucket that is spoken to as Amazon S3 is."""
