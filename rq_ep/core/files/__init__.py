"""Files of ours and of users: written atomically, read within bounds, with errors of one line."""
