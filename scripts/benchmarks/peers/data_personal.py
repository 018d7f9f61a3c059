"""The peer: personal data by Presidio's pattern recognisers. Run by .venv-data; imports nothing of Luthier.

    .venv-data/bin/python scripts/benchmarks/peers/data_personal.py --texts FILE --settings JSON --out FILE

Without its language models, which find names. Every recogniser whose kind is planted takes part, with the phone regions
that are planted; a result counts from `score` on.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import tldextract  # type: ignore[import-not-found]
from presidio_analyzer import predefined_recognizers as known  # type: ignore[import-not-found]

# Its list of domain endings comes with the package; by itself it would ask the network for a newer one.
tldextract.tldextract.TLD_EXTRACTOR = tldextract.TLDExtract(suffix_list_urls=())


def recognisers(regions: list[str]) -> list[tuple[str, Any]]:
    """(our name of the kind, recogniser)."""
    return [
        ("email", known.EmailRecognizer()),
        ("phone", known.PhoneRecognizer(supported_regions=regions)),
        ("card", known.CreditCardRecognizer()),
        ("iban", known.IbanRecognizer()),
        ("ip", known.IpRecognizer()),
        ("national_id", known.UsSsnRecognizer()),
        ("national_id", known.EsNifRecognizer()),
        ("national_id", known.FiPersonalIdentityCodeRecognizer()),
    ]


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("texts", "settings", "out"):
        parser.add_argument(f"--{name}", required=True)
    given = parser.parse_args()
    texts, settings = json.loads(Path(given.texts).read_text()), json.loads(given.settings)
    tools = recognisers(settings["regions"])
    started = time.process_time()
    found = [
        [
            (result.start, result.end, kind)
            for kind, tool in tools
            for result in tool.analyze(text, tool.supported_entities, None) or ()
            if result.score >= settings["score"]
        ]
        for text in texts
    ]
    Path(given.out).write_text(json.dumps({"cpu_s": time.process_time() - started, "hits": found}))


if __name__ == "__main__":
    main()
