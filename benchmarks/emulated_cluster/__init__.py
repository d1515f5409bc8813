"""Step times of plans on nodes without machines, predicted and measured; see ``__main__``."""
