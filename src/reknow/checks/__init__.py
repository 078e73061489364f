"""What settings and arguments may be, checked before anything is done."""
