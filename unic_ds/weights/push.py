"""Upload of an exported folder to the Hugging Face hub: what is sent is checked first.

Only a folder's own files with names of an export are sent, in one commit.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, constants, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from unic_ds.files import read_limited, read_text
from unic_ds.files.documents import parse_yaml
from unic_ds.files.printable import printable
from unic_ds.teachers import licences
from unic_ds.teachers.licences import Terms
from unic_ds.weights import card_names
from unic_ds.weights.card_names import KEY

EXPORT = re.compile(
    r"README\.md|LICENSE(\.md|\.txt)?|NOTICE(\.md|\.txt)?"
    r"|(model|ladder|statistics|open_clip_model)\.safetensors"
    r"|model-\d{5}-of-\d{5}\.safetensors|model\.safetensors\.index\.json"
    r"|(config|ladder|preprocessor_config|preprocessing|open_clip_config)\.json"
    r"|(tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab)\.json"
    r"|(merges|vocab)\.txt|(tokenizer|spiece)\.model|student_tower\.(py|json)|narrow_vit\.py"
    r"|\w+\.onnx(\.data)?|\w+\.pt2|\w+\.png"
)
"""Names of files that an export may have."""
TEXTS = (".md", ".json", ".txt", ".py", "")
"""Endings of files that are searched for secrets."""
SEARCHED = 256 << 20
"""Bytes of the largest text that is searched; a tokenizer's may have tens of millions."""
SECRETS = {
    "a Hugging Face token": rb"\bhf_[A-Za-z0-9]{30,}",
    "a GitHub token": rb"\b(gh[pousr]_[A-Za-z0-9]{36}|github_pat_\w{40,})",
    "an AWS key": rb"\bA(KI|SI)A[0-9A-Z]{16}\b",
    "an API key": rb"\bsk-[A-Za-z0-9_-]{32,}",
    "a private key": rb"-----BEGIN [A-Z ]*PRIVATE KEY",
}
BINDING: tuple[Terms, ...] = ("non-commercial", "research only")
"""Terms that a permissive licence in the card's metadata would hide."""


@dataclass(frozen=True, kw_only=True)
class Upload:
    """Files that are sent, and their destination."""

    folder: Path
    repository: str
    private: bool
    revision: str  # branch; empty: main
    files: Mapping[str, int]
    """Bytes of each file, by name."""
    metadata: str
    """The card's metadata, as YAML."""
    warnings: tuple[str, ...] = field(default=())

    def describe(self, endpoint: str = "") -> str:
        """All that would be sent, as text."""
        width = max(map(len, self.files))
        rows = [f"  {name:{width}}  {size:>15,} bytes" for name, size in self.files.items()]
        lines = [
            f"repository  {self.repository} ({'private' if self.private else 'public'}) on"
            f" {endpoint or constants.ENDPOINT}, branch {self.revision or 'main'}",
            f"folder      {printable(self.folder)}",
            f"files       {len(self.files)}, {sum(self.files.values()):,} bytes",
            *rows,
            "metadata of the card",
            *(f"  {printable(line)}" for line in self.metadata.splitlines()),
            *(f"warning: {line}" for line in self.warnings),
        ]
        return "\n".join(lines)


def plan(folder: Path, repository: str, *, private: bool = False, revision: str = "") -> Upload:
    """Check an exported folder, or a run's, and what the hub will be told about it.

    ValueError, one sentence, for a folder without a card, foreign files or secrets in it, an id
    that the hub does not take, and a licence that hides a teacher's. The network is not used.
    """
    check_repository(repository)
    if revision and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._/-]*", revision):
        raise ValueError(
            f"--revision must be a branch of letters, digits, ., _, / and -, got"
            f" {printable(revision)!r}"
        )
    found = export_in(folder)
    try:
        files = dict(files_of(found))
        for name in files:
            refuse_secrets(found / name)
        metadata, plain = metadata_of(found / card_names.FILE)
    except OSError as error:
        raise ValueError(
            f"{printable(error.filename or found)!r} cannot be checked ({error.strerror or error}),"
            " and nothing is sent unchecked; mend it, or take it out of the folder"
        ) from None
    return Upload(
        folder=found,
        repository=repository,
        private=private,
        revision=revision,
        files=files,
        metadata=metadata,
        warnings=tuple(licence_warnings(plain)),
    )


def check_repository(repository: str) -> None:
    """ValueError unless the hub takes an id, with its owner."""
    try:
        validate_repo_id(repository)
        valid = "/" in repository
    except HFValidationError:
        valid = False
    if not valid:
        raise ValueError(
            f"{printable(repository)!r} is no repository of the hub; give OWNER/NAME, of letters,"
            " digits, -, _ and ."
        )


def export_in(folder: Path) -> Path:
    """The exported folder that a folder is, or that of the run in it; ValueError without one."""
    shown = repr(printable(folder))
    if not folder.is_dir():
        raise ValueError(f"{shown} is no folder; give a run's folder, its student/ or an export")
    if (folder / "config.yaml").is_file():
        if not (folder / "student" / card_names.FILE).is_file():
            raise ValueError(
                f"the run {shown} has no student/ yet; finish it, or write one of its checkpoints"
                " by `unic-ds export` and give that folder"
            )
        return folder / "student"
    if not (folder / card_names.FILE).is_file():
        raise ValueError(
            f"{shown} has no model card ({card_names.FILE}); write it by `unic-ds export`"
        )
    return folder


def files_of(folder: Path) -> Iterator[tuple[str, int]]:
    """Yield name and bytes of a folder's files; ValueError for one that is not of an export."""
    for path in sorted(folder.iterdir()):
        if path.name == "__pycache__" and path.is_dir():  # of an export's module, on its import
            continue
        shown = repr(printable(path))
        if path.is_symlink() and path.resolve().parent != folder.resolve():
            raise ValueError(f"{shown} is a link out of the folder; put the file itself there")
        if not path.is_file() or not EXPORT.fullmatch(path.name):
            raise ValueError(f"{shown} is no file of an export; move it out of the folder")
        yield path.name, path.stat().st_size


def refuse_secrets(path: Path) -> None:
    """ValueError if a text file holds what looks like a token or a key."""
    if path.suffix not in TEXTS:
        return
    text = read_limited(path, SEARCHED)
    for what, pattern in SECRETS.items():
        if found := re.search(pattern, text):
            line = text.count(b"\n", 0, found.start()) + 1
            raise ValueError(
                f"line {line} of {printable(path)!r} holds {what}; revoke it and take it out"
            )


def metadata_of(card: Path) -> tuple[str, Mapping[str, object]]:
    """The metadata of a card as YAML and as values; ValueError if it is not valid on the hub."""
    shown = repr(printable(card))
    text = read_text(card)
    match = re.match(r"\s*---[\r\n]+(.*?)[\r\n]+---(\r|\n|$)", text, re.S)
    if not match:
        raise ValueError(f"{shown} has no metadata; write the card by `unic-ds export`")
    try:
        plain = parse_yaml(match[1])
        if not isinstance(plain, dict):
            raise ValueError("it is no mapping")
        ModelCard(text)
    except (ValueError, TypeError) as error:
        why = printable(error)
        raise ValueError(f"the metadata of {shown} are not valid: {why}") from None
    return match[1], plain


def licence_warnings(metadata: Mapping[str, object]) -> Iterator[str]:
    """Yield what the licences of the teachers and of the weights mean for who publishes.

    ValueError if one is not permissive and the metadata have no `license`.
    """
    terms = terms_in(metadata)
    if not terms:
        yield "the card names no teachers, so their licences were not checked"
    of = {kind: [n for n, found in terms.items() if found == kind] for kind in terms.values()}
    licence = metadata.get("license")
    for kind in sorted(of, key=licences.STRICTNESS.index, reverse=True):
        names = printable(", ".join(of[kind]))
        if kind != "permissive" and not licence:
            raise ValueError(
                f"the licence of {names} is {kind}, but the card's metadata have no license; add"
                " one that says so, as license: cc-by-nc-4.0 or unknown"
            )
        if kind in BINDING and licences.licence_class(licence) == "permissive":
            yield (f"the card says license: {printable(licence)}, but that of {names} is {kind}")
        elif kind == "unknown":
            yield f"the licence of {names} is not known; publish only what its authors permit"
        elif kind != "permissive":
            binds = "binds" if card_names.WEIGHTS in of[kind] else "may bind"
            yield f"the licence of {names} is {kind}; it {binds} whoever uses this model"


def terms_in(metadata: Mapping[str, object]) -> dict[str, Terms]:
    """Terms of each teacher in a card's metadata, and of the weights if they have their own.

    The strictest of a name's licences and its `terms`.
    """
    facts = metadata.get(KEY)
    facts = facts if isinstance(facts, dict) else {}
    rows = facts.get("teachers")
    named = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    if facts.get("licence"):
        named.append({"name": card_names.WEIGHTS, "licence": facts["licence"]})
    found: dict[str, Terms] = {}
    for row in named:
        name = str(row.get("name"))
        stated = [terms for terms in licences.STRICTNESS if terms == row.get("terms")]
        stated += [found[name]] if name in found else []
        found[name] = licences.strictest([licences.licence_class(row.get("licence")), *stated])
    return found


def send(upload: Upload, *, endpoint: str | None = None) -> str:
    """Create the repository unless it exists, upload the files in one commit; return its address.

    ValueError without a token or if an existing repository is public but must be private;
    RuntimeError if the network or the hub fails.
    """
    token = get_token()
    if not token:
        raise ValueError(
            "no token of the hub is set; run `hf auth login`, or set HF_TOKEN (a token that may"
            " write, from https://huggingface.co/settings/tokens)"
        )
    api = HfApi(endpoint=endpoint, token=token, library_name=KEY)
    try:
        public = not create(api, upload)
        address = "" if upload.private and public else commit(api, upload)
    except Exception as error:  # the hub's HTTP library, and so its errors, depend on its version
        why = printable(str(error).strip().split("\n")[0] or type(error).__name__)
        raise RuntimeError(
            f"{upload.repository} was not uploaded to {printable(api.endpoint)}: {why}"
        ) from error
    if not address:
        raise ValueError(
            f"{upload.repository} exists and is public, so --private would not hold; change it on"
            " its page, or choose another name"
        )
    return address


def create(api: HfApi, upload: Upload) -> bool:
    """Create repository and branch unless they exist; True if it is private."""
    repository = upload.repository
    api.create_repo(repository, private=upload.private, exist_ok=True)
    private = upload.private and bool(api.repo_info(repository).private)
    if upload.revision and private == upload.private:
        api.create_branch(repository, branch=upload.revision, exist_ok=True)
    return private


def commit(api: HfApi, upload: Upload) -> str:
    """Upload the files; the address of the commit."""
    operations = [
        CommitOperationAdd(path_in_repo=name, path_or_fileobj=str(upload.folder / name))
        for name in upload.files
    ]
    done = api.create_commit(
        upload.repository,
        operations,
        commit_message="Upload of unic_ds",
        revision=upload.revision or None,
    )
    return done.commit_url
