//! What a directory promises: one user, one format, one owner; a crash and a full disk lose nothing acknowledged.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

use super::cluster::{Cluster, LONG, eventually, rows, set};
use crate::clock::monotonic;
use crate::ids::{NodeId, RaftGroupId};
use crate::replication::directory::Directory;
use crate::replication::store::Store;
use crate::replication::{Error, ReplicaConfig};

const CRASH_DIR: &str = "VERBUND_TEST_CRASH_DIR";
const SMALL_DISK: &str = "VERBUND_TEST_SMALL_DISK";
/// For machines that allow neither mounting nor namespaces.
const NO_SMALL_DISK: &str = "VERBUND_TEST_NO_SMALL_DISK";

#[test]
fn a_directory_in_use_of_another_format_or_of_another_node_is_refused_by_name() {
    let dir = tempfile::tempdir().expect("a directory");
    let open =
        |group, node| Directory::open(dir.path(), RaftGroupId(group), NodeId(node)).map(drop);
    let held = Directory::open(dir.path(), RaftGroupId(0), NodeId(1)).expect("a directory");
    let refused = open(0, 1);
    assert_eq!(
        refused,
        Err(Error::Locked {
            dir: dir.path().to_owned()
        })
    );
    assert!(
        refused
            .unwrap_err()
            .to_string()
            .contains(&dir.path().display().to_string())
    );
    drop(held);
    // A process that another test is starting holds the lock too, between fork and exec.
    let begin = monotonic();
    while matches!(open(0, 1), Err(Error::Locked { .. })) && begin.elapsed() < LONG {
        std::thread::yield_now();
    }
    assert_eq!(open(0, 1), Ok(()));
    for (group, node) in [(0, 2), (3, 1)] {
        let refused = open(group, node);
        assert!(
            matches!(&refused, Err(Error::Foreign { .. })),
            "{refused:?}"
        );
    }
    std::fs::write(dir.path().join("FORMAT"), "verbund-replica 99\n").expect("written");
    let text = open(0, 1).unwrap_err().to_string();
    assert!(
        text.contains("verbund-replica 99") && text.contains("verbund-replica 1\""),
        "{text}"
    );
    std::fs::write(dir.path().join("FORMAT"), [0xff, 0x00, b'\n']).expect("written");
    assert!(matches!(open(0, 1), Err(Error::Format { .. })));
    std::fs::remove_file(dir.path().join("FORMAT")).expect("removed");
    std::fs::create_dir(dir.path().join("db")).expect("made");
    assert!(
        matches!(open(0, 1), Err(Error::Format { .. })),
        "data without a format is not overwritten"
    );
}

#[test]
fn a_directory_that_cannot_be_made_says_so() {
    let file = tempfile::NamedTempFile::new().expect("a file");
    let refused = Directory::open(&file.path().join("x"), RaftGroupId(0), NodeId(1)).map(drop);
    assert!(matches!(refused, Err(Error::Storage { .. })), "{refused:?}");
}

/// Not a test of its own: what [`acknowledged_commands_survive_kill_9`] starts and kills.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "started by another test, as a process to kill"]
async fn crash_child() {
    let Some(dir) = std::env::var_os(CRASH_DIR) else {
        return;
    };
    let mut cluster = Cluster::start(0, |config: &mut ReplicaConfig| {
        config.bootstrap = Some(vec![NodeId(1)]);
        config.max_log_entries = 50;
    });
    cluster.set_dir(1, dir.into());
    cluster.start_node(1);
    loop {
        let reply = cluster.propose(b"add n".to_vec()).await;
        // The line says that this many were acknowledged.
        println!("acknowledged {}", String::from_utf8_lossy(&reply));
    }
}

#[test]
fn acknowledged_commands_survive_kill_9() {
    let dir = tempfile::tempdir().expect("a directory");
    let mut acknowledged = 0u64;
    for round in 1..=4u64 {
        let mut child = Command::new(std::env::current_exe().expect("this test"))
            .args([
                "--exact",
                "replication::tests::disk::crash_child",
                "--ignored",
                "--nocapture",
            ])
            .env(CRASH_DIR, dir.path())
            .stdout(Stdio::piped())
            .spawn()
            .expect("a process");
        let lines = BufReader::new(child.stdout.take().expect("its output")).lines();
        let numbers = lines.map_while(Result::ok).filter_map(|line| {
            // The test harness may write on the same line before.
            line.split_once("acknowledged ")
                .map(|(_, n)| n.parse::<u64>().unwrap_or(0) + 1)
        });
        let mut seen = 0;
        for number in numbers {
            assert!(
                number > acknowledged,
                "round {round}: {acknowledged} were acknowledged, now {number}"
            );
            acknowledged = number;
            seen += 1;
            if seen == 40 + round * 17 {
                child.kill().expect("killed");
            }
        }
        assert!(seen >= 40, "the process worked");
        child.wait().expect("ended");
    }
    let directory = Directory::open(dir.path(), RaftGroupId(0), NodeId(1))
        .expect("the lock went with the process");
    let store = Store::open(std::sync::Arc::new(directory), None).expect("a store");
    let log_end = store.truncated().expect("readable").index
        + store
            .log_shape(store.truncated().expect("readable").index)
            .expect("readable")
            .len() as u64;
    assert!(
        log_end >= acknowledged,
        "{log_end} entries for {acknowledged} commands"
    );
}

/// A small disk of its own.
struct SmallDisk {
    dir: tempfile::TempDir,
}

impl SmallDisk {
    /// `None` where mounting is not allowed.
    fn mount() -> Option<Self> {
        let dir = tempfile::tempdir().expect("a directory");
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", "size=64m", "tmpfs"])
            .arg(dir.path())
            .stderr(Stdio::null())
            .status()
            .is_ok_and(|status| status.success());
        mounted.then(|| Self { dir })
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount")
            .arg("-l")
            .arg(self.dir.path())
            .status();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_refuses_clearly_loses_nothing_and_recovers_by_itself() {
    if let Some(disk) = SmallDisk::mount() {
        return fill_up(disk).await;
    }
    // Whoever may not mount may do so in a namespace of its own, on most systems.
    let child = Command::new("unshare")
        .arg("-Urm")
        .arg(std::env::current_exe().expect("this test"))
        .args(["--exact", "replication::tests::disk::full_disk_child"])
        .args(["--ignored", "--nocapture"])
        .env(SMALL_DISK, "1")
        .output();
    let output = |child: &std::process::Output| {
        [&child.stdout, &child.stderr]
            .map(|text| String::from_utf8_lossy(text).into_owned())
            .concat()
    };
    let ran = child
        .as_ref()
        .is_ok_and(|child| output(child).contains("running 1 test"));
    match child {
        Ok(child) if child.status.success() => {
            assert!(output(&child).contains("1 passed"), "{}", output(&child));
        }
        _ if !ran && std::env::var_os(NO_SMALL_DISK).is_some() => {
            eprintln!("skipped: no small disk can be mounted, and {NO_SMALL_DISK} is set");
        }
        Ok(child) => panic!(
            "neither mount nor unshare gave a small disk, or the test failed on it; set {NO_SMALL_DISK}=1 to skip \
             it:\n{}",
            output(&child)
        ),
        Err(error) => panic!("unshare: {error}; set {NO_SMALL_DISK}=1 to skip this test"),
    }
}

/// Not a test of its own: the one above, where it may mount.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "started by another test, in a namespace where it may mount"]
async fn full_disk_child() {
    if std::env::var_os(SMALL_DISK).is_some() {
        fill_up(SmallDisk::mount().expect("a namespace of its own allows it")).await;
    }
}

async fn fill_up(disk: SmallDisk) {
    let mut cluster = Cluster::start(0, |config: &mut ReplicaConfig| {
        config.bootstrap = Some(vec![NodeId(1)])
    });
    cluster.set_dir(1, disk.dir.path().join("replica"));
    cluster.start_node(1);
    cluster.propose(set("first", b"1")).await;
    let ballast = disk.dir.path().join("ballast");
    std::fs::write(&ballast, vec![1u8; 32 << 20]).expect("written");
    let mut acknowledged = 0u32;
    let error = loop {
        // Incompressible, so that the disk does fill.
        let value: Vec<u8> = (0..300_000u32)
            .map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8 ^ acknowledged as u8)
            .collect();
        match cluster
            .replica(1)
            .propose(set(&format!("k{acknowledged:04}"), &value))
            .await
        {
            Ok(_) => acknowledged += 1,
            Err(error) => break error,
        }
        assert!(acknowledged < 500, "the disk never filled");
    };
    assert!(matches!(&error, Error::Storage { .. }), "{error:?}");
    assert!(error.to_string().contains("free space"), "{error}");
    assert!(acknowledged > 0);
    let refused = cluster.replica(1).propose(set("more", b"1")).await;
    assert!(refused.is_err(), "{refused:?}");
    assert!(!cluster.replica(1).status().is_leader);
    std::fs::remove_file(&ballast).expect("space is free again");
    eventually(|| cluster.replica(1).status().is_leader.then_some(())).await;
    let reply = tokio::time::timeout(LONG, cluster.propose(set("after", b"1")))
        .await
        .expect("it works again");
    assert_eq!(reply, b"");
    let view = cluster.replica(1).read_index().await.expect("readable");
    let keys: Vec<_> = rows(&view).into_iter().map(|(key, _)| key).collect();
    for i in 0..acknowledged {
        assert!(
            keys.contains(&format!("k{i:04}").into_bytes()),
            "k{i:04} was acknowledged"
        );
    }
    drop(view);
    cluster.stop_node(1).await;
}
