"""What a run needs around the algorithm: its folder, its data, its scores, its pictures."""
