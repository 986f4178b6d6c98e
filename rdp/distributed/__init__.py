"""Which processes train one model together, and how they come to one view of what is frozen."""
