"""Programs that an ordinary user writes and that once went wrong: each must be right, or refused at once."""
