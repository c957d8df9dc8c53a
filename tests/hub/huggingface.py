"""What huggingface_hub makes of a hub and of a cache, as JSON. HF_ENDPOINT and HF_HUB_CACHE say which.

huggingface.py download REPO REVISION            every file, into the cache
huggingface.py read REPO REVISION FILE...        the files of the cache, without network
huggingface.py again REPO REVISION FILE...       the same files, asked of the hub
huggingface.py verify REPO REVISION              the cache's files against the hub's hashes
huggingface.py card FILE                         a model card
"""

import json
import os
import sys
from pathlib import Path

task, target, *rest = sys.argv[1:]
if task == "read":
    os.environ["HF_HUB_OFFLINE"] = "1"

import huggingface_hub as hub


def scanned():
    """What a scan of the cache finds."""
    cache = hub.scan_cache_dir()
    revisions = [(repo, revision) for repo in cache.repos for revision in repo.revisions]
    return {
        "warnings": [str(warning) for warning in cache.warnings],
        "repos": {repo.repo_id: sorted(revision.refs) for repo, revision in revisions},
        "files": sorted(file.file_name for _, revision in revisions for file in revision.files),
    }


def paths(files):
    return {file: hub.hf_hub_download(target, file, revision=rest[0]) for file in files}


if task == "download":
    result = {"directory": hub.snapshot_download(target, revision=rest[0]), **scanned()}
elif task == "read":
    directory = hub.snapshot_download(target, revision=rest[0], local_files_only=True)
    result = {"directory": directory, "paths": paths(rest[1:]), **scanned()}
elif task == "again":
    directory = hub.snapshot_download(target, revision=rest[0], allow_patterns=rest[1:])
    result = {"directory": directory, "paths": paths(rest[1:])}
elif task == "verify":
    found = hub.HfApi().verify_repo_checksums(target, revision=rest[0])
    result = {"checked": found.checked_count, "mismatches": [m["path"] for m in found.mismatches]}
elif task == "card":
    card = hub.ModelCard.load(Path(target))
    result = {"data": card.data.to_dict(), "text": card.text}
print(json.dumps(result))
