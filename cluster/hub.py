"""The Hub: a model's files at a commit, from its cache or the network, and what a refusal means."""

from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from cluster.errors import ModelError


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
