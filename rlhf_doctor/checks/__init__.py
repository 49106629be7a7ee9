"""Every check, one folder a family, one file a check."""
