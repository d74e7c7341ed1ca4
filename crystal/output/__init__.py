"""What reaches people: progress, text, pictures, the wording of mistakes, and what an interrupt does."""
