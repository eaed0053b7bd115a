"""Every Redis key, channel, queue name and time-to-live, each with its one writer. Only broker.py and its own parts
(link, fleetview, keyring, operating, ratelimit, outbox) import this.

`rq:` keys are RQ's own formats, so that its tools show and steer this fleet; `zf:` keys are ours.
"""

from __future__ import annotations

import json

from common.histograms import SECONDS as SECONDS  # for the scripts that count
from common.histograms import STAGE_SECONDS as STAGE_SECONDS

# Ours                                            written by
TASK = "zf:task:"  # + id: the record, a hash       submit, and every transition after it
TENANT_TASKS = "zf:tasks:"  # + tenant, and + *, everybody's: zset by age  submit
OPEN = "zf:open"  # zset of ids not yet final       submit; the final transitions remove
DEADLINES = (
    "zf:deadlines"  # zset of queued ids -> deadline, ms   submit, and what puts a task back; claim and the ends remove
)
LEASES = "zf:leases"  # zset id -> expiry, ms       claim, beat; finish, release, reap remove
BELL = "zf:bell:"  # + model: list of wake-ups      submit, claim, release, reap; workers pop
READY = "zf:ready:"  # + model.priority: zset of tenants with work by virtual start (fair share)   submit, claim
CLOCK = "zf:clock"  # hash model.priority -> virtual time of the fair share          claim
TAGS = "zf:finish:"  # + model.priority: zset tenant -> virtual finish of its last task, while after the clock   claim
LEAD = "zf:lead"  # hash model.priority -> what makes its virtual times comparable with other models'   claim
PASSED = "zf:passed"  # hash model.priority -> tasks of higher priorities started over it in a row   claim
CLAIM = "zf:claim:"  # + worker: its last claim, so that a re-sent one gives the same tasks   claim
DEAD = "zf:dead:"  # + worker: there for a while after its runs were taken back   reap
IDEMPOTENCY = "zf:idem:"  # + tenant:hash of the key: id and body hash      submit
API_KEY = "zf:key:"  # + id: hash of the key, JSON, and what the claim reads of it    keyring
API_KEYS = "zf:keys"  # set of ids: there as soon as a key was ever made    keyring
SHARES = "zf:shares"  # hash tenant -> its share of the GPUs, where that is not 1    keyring
SECRETS = "zf:secrets"  # hash purpose -> what all gateways sign with alike    keyring
RATES = "zf:rates"  # + :…:key id: how far ahead of its rate a key is    ratelimit (throttled-py names the rest)
SECRET_BEFORE = ":before"  # after a purpose: the secret before, and until when it is good, ms    rotate_secret
QUEUED_OF = "zf:queued:"  # + key id: its tasks that stand in line, a set    submit, requeue; claim and the ends remove
RUNNING_OF = "zf:running:"  # + key id: its tasks on GPUs, a set    claim; what ends an attempt removes
PARKED = "zf:parked:"  # + key id: queues that wait until one of its runs ends, a set   claim; what ends a run removes
PACE = "zf:paces"  # hash: what finish.lua learns of how long a picture takes    finish
BACKLOG = "zf:backlog"  # hash queue -> "cost tasks pictures" of what stands there    as QUEUED_OF
DUE = "zf:due:"  # + model: zset of pictures on GPUs -> when they are expected to be done, ms    as RUNNING_OF
ETA_ERRORS = "zf:eta:errors"  # hash: how far estimates were off, a histogram for each model    finish
REAPED = "zf:reaped"  # when somebody last looked for leases that had run out, ms     reap
REAP_GRACE = "zf:reaped:grace"  # there while no lease counts as run out    reap
EXPIRED = (
    "zf:expired"  # list of ids that ended at their deadline and nobody has told of    whatever ends them; expire pops
)
RECONCILED = "zf:reconciled"  # there while the last reconciliation is fresh     reconcile
WORKERS = "zf:workers"  # zset worker name -> last beat, ms      beat
CARD = "zf:card:"  # + worker: how it describes itself, JSON     beat
DRAINED = "zf:drained"  # set of workers' slots that claim nothing    operating; claim obeys
RESTART = "zf:restart:"  # + worker: there while it is asked to make room for a fresh one    operating; beat tells it
COUNTS = "zf:counts"  # hash of the fleet's counters, see lua/_counts.lua     the transitions, add_counts
COUNTED = "zf:counts:"  # + process: number of what it told last, so that what is told again counts once    add_counts
HISTORY = "zf:history:"  # + window: list of samples, oldest first, of a fixed length     sample
SAMPLED = "zf:sampled"  # the interval that was sampled last     sample
DISKS = "zf:disks"  # hash host -> "free size when", bytes and ms, of its results' disk    note_disk; sample removes
ENERGY = "zf:energy"  # hash host|GPU -> "joules when": whole ones of its last reading, and ms    sample
PROBE = "zf:probe"  # proves that Redis takes writes        ready
DELIVERIES = "zf:deliveries"  # zset of ids of webhooks' deliveries that are not settled -> when to look at them, ms:
#   +inf in its queue, else its next try or the end of its lease    announce (_shared), deliver_take, deliver_settle
TO_DELIVER = "zf:deliveries:ready"  # zset of tenants with deliveries in line -> their last turn, ms    the same
DELIVER_BELL = "zf:deliveries:bell"  # list of wake-ups    the same; couriers pop
DELIVER_TAKEN = "zf:deliveries:taken:"  # + courier: what it took last, so that a re-sent take gives the same
DELIVER_MENDED = "zf:deliveries:mended"  # there while the last look for lost ones is fresh    deliver_mend
ENDS = "zf:ends"  # channel: "<id> <final state> <step> <steps>"    whatever makes a task final
STEPS = "zf:steps"  # channel: the same of all that happens before  progress, claim, and what puts a task back

# RQ's                                             written by
RQ_QUEUES = "rq:queues"  # set of queue keys         submit
RQ_QUEUE = "rq:queue:"  # + queue: list of ids       submit, claim, release, reap, cancel
RQ_JOB = "rq:job:"  # + id: hash                     submit, and every transition after it
RQ_STARTED = "rq:wip:"  # + queue: zset id:attempt   claim; finish, release, reap remove
RQ_FINISHED = "rq:finished:"  # + queue              finish
RQ_FAILED = "rq:failed:"  # + queue                  finish, reap, expire, view, claim (forged jobs)
RQ_CANCELED = "rq:canceled:"  # + queue              cancel, finish
RQ_SCHEDULED = "rq:scheduled:"  # + queue: zset of deliveries -> next try, s    deliver_settle; deliver_take removes
RQ_WORKER = "rq:worker:"  # + worker: hash           RQ's registration; claim, finish, beat keep it current
RQ_WORKERS = "rq:workers"  # set of worker keys       RQ's registration; reap removes the dead
RQ_WORKERS_OF = "rq:workers:"  # + queue: likewise
WEBHOOK_QUEUE = "webhooks."  # + tenant: the queue of its webhooks' deliveries
RQ_SUSPENDED = "rq:suspended"  # set by `rq suspend` and operating; claim obeys

# Times to live
CARD_BEATS = 5  # a card outlives its worker by this many beats
CLAIM_TTL_S = 120  # a re-sent claim comes within seconds
DEAD_TTL_S = 120  # and so does one that its dead worker had still sent
IDEMPOTENCY_TTL_S = 24 * 3600
BELL_TTL_S = 3600
TOMBSTONE_FACTOR = 2  # a record outlives its result by as long again, to answer "expired" rather than "unknown"
PROBE_TTL_S = 60
COUNTED_TTL_S = 3600
DISK_TTL_S = 60  # a host that has not told for so long tells no more
ENERGY_TTL_S = 300  # what a GPU used while nobody told of it for so long is nobody's
EXPIRED_MOST = 1_000  # that are kept to be told of, while no supervisor lives
OVERDUE_S = 3600  # a run this long past its estimate is no longer counted as one


def queue_name(model: str, priority: str, tenant: str) -> str:
    """Return the RQ queue of these tasks."""
    return f"{model}.{priority}.{tenant}"


def lua_table() -> str:
    """Return this module's constants as a Lua table literal `K`, so that no script spells a key."""
    names = {name: value for name, value in globals().items() if name.isupper() and isinstance(value, str | int)}
    return "local K = cjson.decode([==[" + json.dumps(names) + "]==])\n"
