"""Elastic process groups: the outer object stays, a rebuild exchanges the native group inside it.

Reading order: `host` (what the worker's session answers), `ops` (what each collective writes), `fill` (valid values for
the outputs of a void one), `spec` and `native` (a native group is built), `sockets` (its sockets are found and shut
down), `link` (one native group and its end), `work` and `issue` (the life of one collective), `log` (outputs kept for
a replacement), `elastic` (the group itself), `registry` (all groups of a worker), `owed` (collectives that others
still need), `patch` (torch.distributed gives elastic groups) and `ddp` (the order of DDP's buckets).
"""

from checkpointless_elastic.groups.elastic import ElasticProcessGroup
from checkpointless_elastic.groups.host import Host, LoggedCollective, Situation
from checkpointless_elastic.groups.registry import Registry
from checkpointless_elastic.groups.spec import GroupSignature, RebuildReport, Superseded
from checkpointless_elastic.groups.work import ElasticWork

__all__ = [
    "ElasticProcessGroup",
    "ElasticWork",
    "GroupSignature",
    "Host",
    "LoggedCollective",
    "RebuildReport",
    "Registry",
    "Situation",
    "Superseded",
]
