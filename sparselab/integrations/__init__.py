"""For the tools of others: `sparselab.integrations.lightning`, `.transformers` and `.peft`.

Each needs its package, which is imported with the module; nothing is imported here.
"""
