"""Finding and fetching what is to be read: folders, lists of every kind, remote addresses."""
