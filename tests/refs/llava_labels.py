"""The published LLaVA label rules, written plainly: ids with -200 at an image, labels with -100 where nothing is supervised."""

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


def with_images(encode, bos, prompt):
    """Chunks between images tokenised one by one, -200 between them, one BOS in front."""
    ids = [bos]
    for number, chunk in enumerate(prompt.split("<image>")):
        ids += [-200] * (number > 0) + encode(chunk)
    return ids


def vicuna(encode, bos, turns):
    """preprocess_v1; a later round is measured behind </s>, where the published code subtracts 1 for Vicuna's pieces."""
    prompt = SYSTEM + " " + "".join(f"USER: {q} ASSISTANT: {a}</s>" for q, a in turns)
    ids = with_images(encode, bos, prompt)
    labels = list(ids)
    at = 1
    labels[:at] = [-100]
    for number, part in enumerate(prompt.split("</s>")):
        if not part:
            break

        def count(text, number=number):
            return len(encode("</s>" + text) if number else with_images(encode, bos, text))

        question, _ = part.split(" ASSISTANT: ")
        length, instruction = count(part), count(question + " ASSISTANT: ") - 2
        labels[at : at + instruction] = [-100] * instruction
        at += length
    assert at == len(ids), "the reference would blank this sample"
    return ids, labels


def chatml_next(encode, start, end, turns, system="You are a helpful assistant."):
    """preprocess_qwen of LLaVA-NeXT until 21 June 2024."""
    newline = encode("\n")
    ids = [start, *encode("system"), *newline, *encode(system), end, *newline]
    labels = [start] + [-100] * (len(ids) - 3) + [end, *newline]
    for question, answer in turns:
        role = [start, *encode("user")]
        message = role + newline
        pieces = question.split("<image>")
        for number, piece in enumerate(pieces):
            message += encode(piece)
            if number < len(pieces) - 1:
                message += [-200, *newline]
        message += [end, *newline]
        ids += message
        labels += [start] + [-100] * (len(message) - 3) + [end, *newline]
        role = [start, *encode("assistant")]
        message = role + newline + encode(answer) + [end, *newline]
        ids += message
        labels += [start] + [-100] * len(role) + message[len(role) + 1 : -2] + [end, *newline]
    return ids, labels


def query(decoded):
    """QueCC's query of a row: decoded text after the last image, cut by string search. None: no image."""
    if decoded is None:
        return "image"
    text = decoded[decoded.find("\n") + 1 :]
    return text[: text.find("ASSISTANT")].strip()
