"""Studies: the tables and figures of papers, made again. Nothing below imports them."""
