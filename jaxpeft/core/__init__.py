"""The transform engine: structured weights, lift, sites, rules. No Flax here."""
