"""The tiny world: drawn portraits, their captions, and the small network that reads them."""
