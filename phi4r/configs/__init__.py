"""Settings: what can be set (`sections`, `stages`), how it is described and checked
(`schema`), and where it comes from (`load`: defaults < model preset < recipe TOML < `--section.key value`).

Frozen dataclasses only. No torch, no megatron and no files other than recipes: this runs on a login node.
"""
