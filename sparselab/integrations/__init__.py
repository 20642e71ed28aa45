"""Callbacks for the training loops of others: `sparselab.integrations.lightning` and `.transformers`.

Each needs its package, which is imported with the module; nothing is imported here.
"""
