"""Prompts -> token numbers."""

import warnings


def tokenize(tokenizer, prompts, window):
    """List of B strings -> (B, L) token numbers, all padded to one length.

    window: the most tokens that the text encoder reads. Longer prompts are cut, with a warning.
    """
    window = min(tokenizer.model_max_length, window)
    for prompt, ids in zip(prompts, tokenizer(prompts, verbose=False).input_ids):
        if len(ids) > window:
            cut = f"prompt of {len(ids)} tokens cut to the text encoder's {window}"
            warnings.warn(f"{cut}: {prompt!r}", stacklevel=4)
    fit = dict(padding="max_length", max_length=window, truncation=True, return_tensors="pt")
    return tokenizer(prompts, **fit).input_ids
