"""Text: prompts into token numbers, and text for one line of a terminal."""

import warnings


def tokenize(tokenizer, prompts, window):
    """List of B strings -> (B, L) token numbers, all padded to one length.

    window: the most tokens that the text encoder reads. Longer prompts are cut, with a warning.
    """
    window = min(tokenizer.model_max_length, window)
    for prompt, ids in zip(prompts, tokenizer(prompts, verbose=False).input_ids):
        if len(ids) > window:
            cut = f"prompt of {len(ids)} tokens cut to the text encoder's {window}"
            warnings.warn(f"{cut}: {one_line(prompt, 100)!r}", stacklevel=4)
    fit = dict(padding="max_length", max_length=window, truncation=True, return_tensors="pt")
    return tokenizer(prompts, **fit).input_ids


def one_line(text, most=300):
    """Text, or an exception's, without line breaks, its middle left out if it is longer than `most`."""
    line = " ".join(str(text).splitlines())
    if len(line) <= most:
        return line
    half = most // 2
    return f"{line[:half]} … {line[-half:]}"


def first_line(error):
    """The first line of an exception's text, or its kind if it has none.

    PyTorch's advice to open a file with weights_only=False is not passed on.
    """
    lines = str(error).strip().splitlines()
    if not lines:
        return type(error).__name__
    if "weights_only" in str(error):
        return "it holds more than tensors and is not opened"
    return one_line(lines[0], 200)


def read_lines(path):
    """The lines of a text file. ValueError, naming it, unless it is UTF-8."""
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error


def read_prompts(root):
    """{photo's name: prompt} of the prompts.tsv in a folder or beside it, {} if there is none.

    A header line, then "<Name>/<file>", a tab, the prompt. ValueError if it holds no such line.
    """
    for path in (root / "prompts.tsv", root.parent / "prompts.tsv"):
        if path.is_file():
            lines = read_lines(path)[1:]  # after the header
            prompts = dict(line.split("\t")[:2] for line in lines if "\t" in line)
            if not prompts:
                raise ValueError(f"{path} holds no line with a photo, a tab and its prompt")
            return prompts
    return {}


def check_identifier(tokenizer, identifier):
    """Warn, naming them, if `identifier` is several tokens: each already means something.

    ValueError if it is none.
    """
    tokens = [token.removesuffix("</w>") for token in tokenizer.tokenize(identifier)]
    if not tokens:
        raise ValueError("the identifier is empty: give one rare word, such as sks")
    if len(tokens) > 1:
        split = f"splits the identifier {identifier!r} into {len(tokens)} tokens, {' + '.join(tokens)}"
        advice = "which may mean something already; better is a rare word of one token"
        warnings.warn(f"the tokenizer {split}, {advice}")


def find_noun(prompts):
    """man, woman or person: the word that most of a person's prompts use."""
    words = [word for prompt in prompts for word in prompt.split()]
    nouns = [word for word in words if word in ("man", "woman")]
    return max(nouns, key=nouns.count, default="person")
