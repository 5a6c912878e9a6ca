//! Every limit of the transport, with its reason.

use std::time::Duration;

/// Largest frame: four times the largest Raft command, small enough that a few dozen fit in memory.
pub const MAX_FRAME_BYTES: usize = 16 * 1024 * 1024;

/// Longest service name; ours have under twenty characters.
pub(crate) const MAX_SERVICE_BYTES: usize = 64;

/// Requests of one node, over all its connections, that may lie in memory at once while they arrive and are handled.
pub(crate) const MAX_REQUEST_BYTES_PER_NODE: usize = 64 * 1024 * 1024;

/// Frames up to this size are not counted against [`MAX_REQUEST_BYTES_PER_NODE`]: the stream limit bounds them.
pub(crate) const UNCOUNTED_BYTES: usize = 16 * 1024;

/// Requests of one connection at once; above what one gateway asks of one worker.
pub(crate) const MAX_REQUESTS_PER_CONNECTION: u32 = 1024;

/// One-way lanes of one connection: one for each Raft group, and some.
pub(crate) const MAX_LANES_PER_CONNECTION: u32 = 64;

/// Inbound connections at once: each node of a cluster of a hundred holds one, its tools a few more.
pub(crate) const MAX_CONNECTIONS: usize = 512;

/// Join handshakes at once. They come from strangers, so few and small.
pub(crate) const MAX_JOINS: usize = 8;

/// Largest join message: a request carries a certificate request and a list of devices.
pub(crate) const MAX_JOIN_BYTES: usize = 64 * 1024;

/// A join includes one Raft commit and one signature.
pub(crate) const JOIN_TIMEOUT: Duration = Duration::from_secs(10);

/// A handshake takes 0.7 ms and a few round trips; a dead address must not hold a caller for long.
pub(crate) const DIAL_TIMEOUT: Duration = Duration::from_millis(400);

/// After a failed dial the next callers are told at once, so that a dead node is not dialled by everybody in turn.
pub(crate) const REDIAL_AFTER: Duration = Duration::from_millis(100);

/// Strangers may keep a half-open handshake this long.
pub(crate) const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(2);

/// A whole request must have arrived after this time: 16 MiB at 1 MB/s.
pub(crate) const REQUEST_TIMEOUT: Duration = Duration::from_secs(20);

/// A dead peer is noticed after this time without any packet.
pub(crate) const IDLE_TIMEOUT: Duration = Duration::from_secs(2);

/// Four chances to answer before [`IDLE_TIMEOUT`].
pub(crate) const KEEP_ALIVE: Duration = Duration::from_millis(500);

/// First guess of the round trip; a region's nodes are milliseconds apart. Decides when a lost first packet is repeated.
pub(crate) const INITIAL_RTT: Duration = Duration::from_millis(40);

/// Unread bytes of one stream: 1 Gbit/s over 30 ms.
pub(crate) const STREAM_WINDOW_BYTES: u32 = 4 * 1024 * 1024;

/// Unread and unacknowledged bytes of one connection.
pub(crate) const CONNECTION_WINDOW_BYTES: u32 = 16 * 1024 * 1024;

/// One-way messages that wait for one peer; beyond, the newest are dropped, which Raft repairs.
pub(crate) const MAX_LANE_MESSAGES: usize = 4096;

/// Bytes of one-way messages that wait for one peer.
pub(crate) const MAX_LANE_BYTES: usize = 48 * 1024 * 1024;

/// One-way messages written in one go.
pub(crate) const LANE_BATCH: usize = 64;

/// A lane without messages for this long is given up.
pub(crate) const LANE_IDLE: Duration = Duration::from_secs(30);

/// Frames that wait between a caller and a handler of the same process.
pub(crate) const LOCAL_FRAMES: usize = 4;

/// Running requests may end within this time of a shutdown.
pub(crate) const DRAIN_TIMEOUT: Duration = Duration::from_secs(2);
