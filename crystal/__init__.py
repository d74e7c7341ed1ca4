"""crystal: a muP-first model zoo that trains Amber and CrystalCoder from scratch, in the open."""

__version__ = "0.1.0"
