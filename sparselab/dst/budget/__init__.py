"""How connections are shared out among layers and rows."""
