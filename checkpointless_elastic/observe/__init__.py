"""What a person sees of a recovery: one record each, as a log line and as a JSON line."""
