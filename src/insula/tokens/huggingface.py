"""A text tokenizer as the two files that `transformers.AutoTokenizer` reads from a folder, with no network and no hub.

The ids there are those here with BOS in front, which is how PaliGemma's own tokenizer begins. A SentencePiece model is
written as the same BPE in the `tokenizers` library's words, since not everybody who reads it has sentencepiece.
"""

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

from insula.errors import InputError
from insula.files import write_json
from insula.tokens.fast import TOKENIZER_FILE
from insula.tokens.text import PALIGEMMA_TOKENS, JSONText, SentencePieceText, TextTokenizer

AUTO_CONFIG_FILE = "tokenizer_config.json"
SPACE = "▁"
"""What SentencePiece writes a space as."""
PROBES = (
    "Task: put the red block in the blue bowl, State: " + " ".join(map(str, range(256))) + ";\nAction: ",
    "Öffne  die Schublade\tvorsichtig: 打开抽屉, 🤖 {x} | y\n\n<eos> </s> _-./",
    " leading and trailing spaces   ",
    "".join(PALIGEMMA_TOKENS[:3] + PALIGEMMA_TOKENS[-3:]) + " <loc0007>cup",
)
"""What both must write alike: prompts, other alphabets, bytes, runs of blanks, control tokens as plain text."""


def save_huggingface(text: TextTokenizer, folder: Path) -> None:
    """Write a tokenizer into a folder as `tokenizer.json` and `tokenizer_config.json`.

    Raises InputError for a tokenizer that is neither of the two kinds of this package, or whose ids would be others
    there.
    """
    if isinstance(text, JSONText):
        written = Tokenizer.from_str(text.tokenizer.to_str())
    elif isinstance(text, SentencePieceText):
        written = _from_sentencepiece(text)
    else:
        raise InputError(
            f"{type(text).__name__} cannot be written as a tokenizer.json; only the package's own kinds can"
        )

    names = {key: written.id_to_token(getattr(text, f"{key}_id")) for key in ("bos", "eos", "pad")}
    written.post_processor = processors.TemplateProcessing(
        single=f"{names['bos']} $A", pair=f"{names['bos']} $A $B:1", special_tokens=[(names["bos"], text.bos_id)]
    )

    # By trying and not by comparing settings: SentencePiece has dozens that change how a text is cut.
    written.encode_special_tokens = True
    for probe in PROBES:
        expected, got = [text.bos_id, *text.encode(probe)], written.encode(probe).ids
        if got != expected:
            raise InputError(
                f"this text tokenizer cannot be written as a {TOKENIZER_FILE}: {probe[:40]!r}... would become "
                f"{got[:8]}..., expected {expected[:8]}...; take a tokenizer.json of the same vocabulary"
            )

    folder.mkdir(parents=True, exist_ok=True)
    (folder / TOKENIZER_FILE).write_text(written.to_str() + "\n", encoding="utf-8")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "padding_side": "right", "split_special_tokens": True}
    settings |= {"clean_up_tokenization_spaces": False}  # it would take blanks out of what is decoded
    write_json(folder / AUTO_CONFIG_FILE, settings | {f"{key}_token": name for key, name in names.items()})


def _from_sentencepiece(text: SentencePieceText) -> Tokenizer:
    """A BPE model's pieces, and as merges every way of making a piece out of two, the best pieces first."""
    from sentencepiece import sentencepiece_model_pb2

    protocol: Any = sentencepiece_model_pb2  # its classes are made while it is imported
    proto = protocol.ModelProto.FromString(text.model)
    kinds = protocol.ModelProto.SentencePiece
    if proto.trainer_spec.model_type != protocol.TrainerSpec.BPE:
        raise InputError(
            "this SentencePiece model is no BPE, which Gemma's is; take a tokenizer.json of its vocabulary"
        )

    vocab = {piece.piece: number for number, piece in enumerate(proto.pieces)}
    merges = []
    for piece in proto.pieces:
        if piece.type == kinds.NORMAL:
            halves = [(piece.piece[:cut], piece.piece[cut:]) for cut in range(1, len(piece.piece))]
            merges += [(-piece.score, vocab[a], vocab[b], (a, b)) for a, b in halves if a in vocab and b in vocab]
    merges.sort()

    model = models.BPE(
        vocab, [pair for *_, pair in merges], unk_token=proto.trainer_spec.unk_piece, fuse_unk=True, byte_fallback=True
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])

    # In the order of their ids, which the library gives to added tokens that the vocabulary lacks.
    control = [piece.piece for piece in proto.pieces if piece.type in (kinds.CONTROL, kinds.UNKNOWN)]
    whole = [piece.piece for piece in proto.pieces if piece.type == kinds.USER_DEFINED]
    appended = [token for token in PALIGEMMA_TOKENS if token not in vocab]
    tokenizer.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in control])
    tokenizer.add_tokens([AddedToken(piece, normalized=SPACE in piece) for piece in whole])
    tokenizer.add_tokens([AddedToken(piece, normalized=False) for piece in appended])
    return tokenizer
