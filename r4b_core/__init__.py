"""r4b_core: train vision-language models that decide for themselves whether to think."""
