"""The contracts: mixer, state, update, layout, card, registry, errors."""
