"""The Hub: a model's files at a commit, from its cache or the network, verified, and what a refusal means."""

from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from cluster.errors import ModelError
from cluster.records import describe_file


def fetch(source: str, revision: str, patterns: tuple[str, ...]) -> Path:
    """A folder with the files of `owner/name` that match, at a commit. Raises ModelError."""
    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=list(patterns)))
    except (HfHubHTTPError, OSError) as error:  # LocalEntryNotFoundError is an OSError
        raise _meaning(error, source, revision) from None


def newest(source: str) -> str:
    """The commit that the main branch of `owner/name` is at now. Raises ModelError."""
    try:
        return str(HfApi().model_info(source).sha)
    except (HfHubHTTPError, OSError) as error:
        raise _meaning(error, source, None) from None


def verify(source: str, revision: str, folder: Path) -> int:
    """Compare the large files of a folder with the SHA-256 that the Hub has of them. Returns how many there are.

    The client checks sizes alone. Raises ModelError for a file that differs, and where the Hub cannot be asked.
    """
    try:
        siblings = HfApi().model_info(source, revision=revision, files_metadata=True).siblings or []
    except (HfHubHTTPError, OSError) as error:
        raise _meaning(error, source, revision) from None
    known = {each.rfilename: each.lfs.sha256 for each in siblings if each.lfs}
    found = [name for name in sorted(known) if (folder / name).is_file()]
    for name in found:
        if describe_file(folder / name, name).sha256 != known[name]:
            raise ModelError(
                f"{source}@{revision}: {name} is not what the Hub has under that commit (its SHA-256 differs); delete "
                f"{(folder / name).resolve()} and fetch it again"
            )
    return len(found)


def _meaning(error: Exception, source: str, revision: str | None) -> ModelError:
    where = f"{source}@{revision}" if revision else source
    if isinstance(error, GatedRepoError):
        return ModelError(f"{where} is gated: accept its licence on the Hub and set HF_TOKEN")
    if isinstance(error, (RepositoryNotFoundError, RevisionNotFoundError)):
        return ModelError(f"{where} does not exist on the Hub, or HF_TOKEN may not read it")
    return ModelError(
        f"{where} is neither in the store nor reachable on the Hub ({str(error).splitlines()[0]}); on a machine with "
        f"the Hub run `luthier cluster models add {source} --revision {revision or 'COMMIT'} --name NAME --store URL`"
    )
