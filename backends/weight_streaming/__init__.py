"""Weight streaming: weights and moments live in a store and pass through the device a layer at a time.

Cerebras' execution model on ordinary hardware: `store` has MemoryX's role (weights, moments, updates), `executor` the
wafer's (activations stay, weights come and gradients go), `reduce` SwarmX's (several executors). docs/streaming.md.
"""
