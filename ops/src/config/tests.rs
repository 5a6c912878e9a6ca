//! What a configuration file may contain, and what is said when it does not.

use super::*;

const EXAMPLE: &str = include_str!("../../examples/node.toml");
const SMALL: &str = r#"
    [node]
    name = "a"
    data = "/d"
    roles = ["worker"]
    listen = "127.0.0.1:1"
    [cluster]
    seeds = ["127.0.0.1:2"]
"#;

fn parse(text: &str, env: &[(&str, &str)]) -> Result<NodeConfig, Error> {
    let env = env.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned()));
    NodeConfig::parse(text, Path::new("node.toml"), env)
}

#[test]
fn the_example_documents_every_key_and_is_valid() {
    let config = parse(EXAMPLE, &[]).expect("the example");
    assert_eq!(config.bootstrap().map(|b| b.len()), Some(1));
    let table: Table = EXAMPLE.parse().expect("TOML");
    for section in keys::sections() {
        for key in keys::of_section(section).expect("section") {
            let documented = table.get(section).and_then(|s| s.get(key.name)).is_some();
            assert!(
                documented,
                "{section}.{} is missing in ops/examples/node.toml",
                key.name
            );
        }
    }
}

#[test]
fn a_written_configuration_is_read_back() {
    for text in [EXAMPLE, SMALL] {
        let config = parse(text, &[]).expect("valid");
        assert_eq!(parse(&config.to_toml(), &[]).expect("written"), config);
    }
}

#[test]
fn the_environment_wins() {
    let env = [
        ("VERBUND_NODE_NAME", "b"),
        ("VERBUND_NODE_ROLES", "gateway, store"),
        ("VERBUND_WORKER_MEMORY_BYTES", "1024"),
        ("VERBUND_WORKER_KV_FORMAT", "int8"),
        ("VERBUND_CLUSTER_BOOTSTRAP", "1=127.0.0.1:3,2=127.0.0.1:4"),
        ("VERBUND_WORKER_TENANT_WAITING", "4000"),
        (
            "VERBUND_WORKER_TENANT_WEIGHTS",
            "musterstadt=2, nordkreis=3",
        ),
        ("VERBUND_MODELS", "/elsewhere"),
        ("VERBUND_ISA", "scalar"),
        ("PATH", "/bin"),
    ];
    let config = parse(SMALL, &env).expect("valid");
    assert_eq!(
        (config.node.name.as_str(), config.worker.memory_bytes),
        ("b", 1024)
    );
    assert_eq!(config.worker.kv_format, worker::kv::KvFormat::Int8);
    assert_eq!(
        config.node.roles,
        BTreeSet::from([Role::Gateway, Role::Store])
    );
    assert_eq!(config.seeds().len(), 3);
    assert_eq!(config.worker.tenant_waiting, 4000);
    let weights = config.tenant_weights();
    let weights: Vec<_> = weights.iter().map(|(id, &w)| (id.as_str(), w)).collect();
    assert_eq!(weights, [("musterstadt", 2), ("nordkreis", 3)]);
}

#[test]
fn a_worker_that_is_told_nothing_schedules_as_the_scheduler_does_by_itself() {
    let config = parse(SMALL, &[]).expect("valid").worker;
    let limits = worker::scheduler::Limits::default();
    assert_eq!(
        (config.max_waiting as usize, config.mixed_rows as usize),
        (limits.max_waiting, limits.mixed_rows)
    );
    assert_eq!((config.tenant_running, config.tenant_waiting), (0, 0));
    assert!(config.tenant_weights.is_empty());
}

#[test]
fn every_mistake_is_named_with_its_remedy() {
    let replaced = |from: &str, to: &str| SMALL.replace(from, to);
    /// File, environment, what the message must contain.
    type Case = (String, Vec<(&'static str, &'static str)>, Vec<&'static str>);
    let cases: Vec<Case> = vec![
        (
            replaced("listen =", "lisen ="),
            vec![],
            vec!["node.lisen", "node.toml", "node.listen"],
        ),
        (
            replaced("[cluster]", "[claster]"),
            vec![],
            vec!["[claster]", "[cluster]"],
        ),
        (
            format!("{SMALL}\n[log]\ntemperature = 1"),
            vec![],
            vec!["log.temperature"],
        ),
        (
            format!("worker = 7\n{SMALL}"),
            vec![],
            vec!["worker", "section", "integer"],
        ),
        (
            SMALL.to_owned(),
            vec![("VERBUND_NODE_LISTN", "x")],
            vec!["VERBUND_NODE_LISTN", "VERBUND_NODE_LISTEN"],
        ),
        (
            SMALL.to_owned(),
            vec![("VERBUND_WORKER_THREADS", "many")],
            vec!["VERBUND_WORKER_THREADS", "number", "many"],
        ),
        (
            replaced("\"worker\"", "\"wroker\""),
            vec![],
            vec!["wroker", "worker"],
        ),
        (
            replaced("[\"worker\"]", "[]"),
            vec![],
            vec!["node.roles", "at least one"],
        ),
        (
            replaced("127.0.0.1:1\"", "0.0.0.0:1\""),
            vec![],
            vec!["node.advertise", "dial"],
        ),
        (
            replaced("127.0.0.1:1\"", "localhost\""),
            vec![],
            vec!["listen"],
        ),
        (
            replaced("seeds = [\"127.0.0.1:2\"]", ""),
            vec![],
            vec!["cluster.seeds", "bootstrap"],
        ),
        (
            replaced("seeds =", "bootstrap = { one = \"127.0.0.1:1\" }\nseeds ="),
            vec![],
            vec!["bootstrap", "one"],
        ),
        (
            format!("{SMALL}\n[worker]\nmax_waiting = 0"),
            vec![],
            vec!["worker.max_waiting", "at least 1", "got 0"],
        ),
        (
            format!("{SMALL}\n[worker]\nmixed_rows = 0"),
            vec![],
            vec!["worker.mixed_rows", "at least 1"],
        ),
        (
            format!("{SMALL}\n[worker]\ntenant_running = -1"),
            vec![],
            vec!["tenant_running", "-1"],
        ),
        (
            format!("{SMALL}\n[worker]\ntenant_wating = 9"),
            vec![],
            vec!["worker.tenant_wating", "worker.tenant_waiting"],
        ),
        (
            format!("{SMALL}\n[worker]\ntenant_weights = {{ nord = 0 }}"),
            vec![],
            vec!["worker.tenant_weights.nord", "1 to 1000", "got 0"],
        ),
        (
            format!("{SMALL}\n[worker]\ntenant_weights = {{ Nord = 2 }}"),
            vec![],
            vec!["worker.tenant_weights", "tenant id", "Nord"],
        ),
        (
            SMALL.to_owned(),
            vec![("VERBUND_WORKER_TENANT_WEIGHTS", "nord=viel")],
            vec!["VERBUND_WORKER_TENANT_WEIGHTS", "musterstadt=2", "viel"],
        ),
        (
            format!("{SMALL}\n[worker]\nkv_format = \"int4\""),
            vec![],
            vec!["int4", "f16", "int8"],
        ),
        (
            SMALL.to_owned(),
            vec![("VERBUND_WORKER_KV_FORMAT", "q8")],
            vec!["q8", "f16", "int8"],
        ),
        (replaced("name = \"a\"", ""), vec![], vec!["name"]),
        (
            replaced("name = \"a\"", "name = \"\""),
            vec![],
            vec!["node.name", "1 to 64"],
        ),
        ("[node".to_owned(), vec![], vec!["not TOML"]),
    ];
    for (text, env, parts) in cases {
        let error = parse(&text, &env).expect_err(&text).to_string();
        for part in parts {
            assert!(error.contains(part), "{error:?} lacks {part:?}");
        }
    }
}

#[test]
fn a_missing_file_is_named() {
    let error = NodeConfig::load(Path::new("/nowhere/node.toml"))
        .expect_err("missing")
        .to_string();
    assert!(error.contains("/nowhere/node.toml"), "{error}");
}
