"""A zoo of architectures: tiny random models whose attentions have to be found, replaced, named and verified.

``make zoo`` runs all of them (``tests/zoo/__main__.py``) and writes the scoreboard; ``pytest tests/zoo`` runs a representative
part, and ``pytest tests/zoo -m zoo -k llama`` a single model.
"""
