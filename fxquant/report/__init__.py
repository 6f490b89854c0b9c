"""What a converted model tells about itself: its ops, its history, its differences."""
