//! The writer over a real database: full disks, locks, and whom a change concerns.

use std::collections::BTreeSet;
use std::sync::Arc;

use mesh_core::key::{MachinePublic, NodePublic};
use mesh_core::netmap::build;
use mesh_core::node::{Generation, HostInfo, MeshId, NodeId, UnixTime};
use mesh_core::world::{Mesh, Pools};
use proptest::prelude::*;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::{ChangeError, Current, Draft, Handle, Writer};
use crate::clock::Clock;
use crate::preauth::{self, Presented};
use crate::registry::admin::{self, KeyRequest, NewPolicy};
use crate::registry::{self, Enrolment};
use crate::state_dir::StateDir;
use crate::store::{Founding, Loaded, Store, StoreError};

fn founding() -> Founding {
    Founding {
        mesh: Mesh {
            id: MeshId([1; 16]),
            domain: "mesh.internal".to_owned(),
            pools: Pools {
                v4: Pools::default_v4(),
                v6: Pools::ula([1; 5]),
            },
        },
        coordinator: MachinePublic([2; 32]),
        now: UnixTime(1),
    }
}

struct Running {
    world: Handle,
    stop: CancellationToken,
    writer: JoinHandle<()>,
    dir: tempfile::TempDir,
}

impl Running {
    /// With room for `pages` more pages than the empty database has.
    async fn start(pages: Option<u32>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::open(dir.path()).unwrap();
        let (mut store, loaded) = Store::open(&state, founding).await.unwrap();
        if let Some(pages) = pages {
            let Store::Sqlite(sqlite) = &mut store;
            sqlite.allow_pages(pages).await;
        }
        let (writer, world) = Writer::new(store, loaded, state, Clock::start()).unwrap();
        let stop = CancellationToken::new();
        let writer = tokio::spawn(writer.run(stop.clone()));
        Self {
            world,
            stop,
            writer,
            dir,
        }
    }

    async fn stop(self) -> tempfile::TempDir {
        self.stop.cancel();
        self.writer.await.unwrap();
        self.dir
    }
}

async fn create_user(world: &Handle, name: String) -> Result<(), ChangeError> {
    let change = move |draft: &mut Draft| admin::create_user(draft, &name, "", "").map(drop);
    world.change(change).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_refuses_and_loses_nothing() {
    let running = Running::start(Some(2)).await;
    let mut made = 0;
    let refused = loop {
        let name = format!("{}-{made}", "x".repeat(240));
        match create_user(&running.world, name).await {
            Ok(()) => made += 1,
            Err(error) => break error,
        }
        assert!(made < 1000, "the disk never fills");
    };
    assert!(
        matches!(refused, ChangeError::Store(StoreError::Full)),
        "{refused}"
    );
    assert!(running.world.trouble().is_some());
    let current = running.world.current();
    assert_eq!(current.world.users.len(), made);

    let dir = running.stop().await;
    let state = StateDir::open(dir.path()).unwrap();
    let (_, loaded) = Store::open(&state, founding).await.unwrap();
    assert_eq!(loaded.users.len(), made);
    assert_eq!(loaded.generation, current.world.generation);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_locked_database_is_waited_for_and_then_refused() {
    let running = Running::start(None).await;
    let options = sqlx::sqlite::SqliteConnectOptions::new()
        .filename(running.dir.path().join("coordinator.db"));
    let mut other = sqlx::ConnectOptions::connect(&options).await.unwrap();
    let lock = "BEGIN IMMEDIATE";
    sqlx::raw_sql(lock).execute(&mut other).await.unwrap();
    let refused = create_user(&running.world, "a".to_owned())
        .await
        .unwrap_err();
    assert!(
        matches!(refused, ChangeError::Store(StoreError::Busy)),
        "{refused}"
    );
    sqlx::raw_sql("COMMIT").execute(&mut other).await.unwrap();
    create_user(&running.world, "a".to_owned()).await.unwrap();
    assert_eq!(running.world.trouble(), None);

    // Shorter than the patience: nobody notices.
    sqlx::raw_sql(lock).execute(&mut other).await.unwrap();
    let world = running.world.clone();
    let waiting = tokio::spawn(async move { create_user(&world, "b".to_owned()).await });
    tokio::time::sleep(std::time::Duration::from_millis(300)).await;
    sqlx::raw_sql("COMMIT").execute(&mut other).await.unwrap();
    waiting.await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn somebody_elses_write_is_noticed_and_never_overwritten() {
    let running = Running::start(None).await;
    let options = sqlx::sqlite::SqliteConnectOptions::new()
        .filename(running.dir.path().join("coordinator.db"));
    let mut other = sqlx::ConnectOptions::connect(&options).await.unwrap();
    let raise = "UPDATE instance SET generation = generation + 5";
    sqlx::raw_sql(raise).execute(&mut other).await.unwrap();
    let refused = create_user(&running.world, "a".to_owned())
        .await
        .unwrap_err();
    assert!(
        matches!(refused, ChangeError::Store(StoreError::Conflict)),
        "{refused}"
    );
    assert_eq!(running.world.current().world.generation, Generation(1));
    assert!(running.world.trouble().is_some());
}

#[tokio::test(flavor = "multi_thread")]
async fn changes_that_wait_together_share_a_generation() {
    let running = Running::start(None).await;
    let crowd: Vec<_> = (0..100)
        .map(|n| {
            let world = running.world.clone();
            tokio::spawn(async move { create_user(&world, format!("user{n}")).await })
        })
        .collect();
    for change in crowd {
        change.await.unwrap().unwrap();
    }
    let world = running.world.current();
    assert_eq!(world.world.users.len(), 100);
    assert!(
        world.world.generation < Generation(90),
        "{}",
        world.world.generation
    );
}

// === whom a change concerns ===

const POLICIES: [&str; 4] = [
    r#"{"acls": []}"#,
    r#"{"tagOwners": {"tag:a": [], "tag:b": []},
        "acls": [{"action": "accept", "src": ["tag:a"], "dst": ["tag:b:22"]}]}"#,
    r#"{"tagOwners": {"tag:a": [], "tag:b": [], "tag:c": []},
        "acls": [{"action": "accept", "src": ["tag:c"], "dst": ["*:*"]},
                 {"action": "accept", "src": ["autogroup:member"], "dst": ["autogroup:self:*"]}]}"#,
    r#"{"tagOwners": {"tag:a": [], "tag:c": []}, "hosts": {"lan": "10.0.0.0/8"},
        "acls": [{"action": "accept", "src": ["tag:a"], "dst": ["lan:80"]},
                 {"action": "accept", "src": ["100.64.0.2"], "dst": ["tag:c:*"]}]}"#,
];

#[derive(Debug, Clone)]
enum Step {
    Enroll(u8, Option<u8>),
    Tag(u8, u8),
    Rename(u8),
    Endpoint(u8, u16),
    Offer(u8, bool),
    Approve(u8, bool),
    Expire(u8),
    Delete(u8),
    Policy(usize),
    User(u8),
}

fn step() -> impl Strategy<Value = Step> {
    let node = 0..6_u8;
    prop_oneof![
        3 => (node.clone(), proptest::option::of(0..3_u8)).prop_map(|(n, tag)| Step::Enroll(n, tag)),
        1 => (node.clone(), 0..3_u8).prop_map(|(n, tag)| Step::Tag(n, tag)),
        1 => node.clone().prop_map(Step::Rename),
        2 => (node.clone(), 1..3_u16).prop_map(|(n, port)| Step::Endpoint(n, port)),
        1 => (node.clone(), any::<bool>()).prop_map(|(n, yes)| Step::Offer(n, yes)),
        1 => (node.clone(), any::<bool>()).prop_map(|(n, yes)| Step::Approve(n, yes)),
        1 => node.clone().prop_map(Step::Expire),
        1 => node.prop_map(Step::Delete),
        1 => (0..POLICIES.len()).prop_map(Step::Policy),
        1 => (0..2_u8).prop_map(Step::User),
    ]
}

fn tag(n: u8) -> String {
    format!("tag:{}", ["a", "b", "c"][usize::from(n)])
}

/// Refusals are fine: then nothing changed.
fn take(draft: &mut Draft, step: &Step) -> Result<(), registry::Refusal> {
    let id = |draft: &Draft, n: u8| {
        let nodes = draft.world().nodes.values();
        let found = nodes.clone().find(|node| node.machine.0[0] == n);
        found.map_or_else(|| "nobody".to_owned(), |node| node.id.to_string())
    };
    match step {
        Step::Enroll(n, owner) => {
            let (prefix, hash, secret) = preauth::generate();
            let user = draft
                .world()
                .users
                .values()
                .next()
                .map(|user| user.name.to_string());
            let request = KeyRequest {
                prefix,
                hash,
                reusable: false,
                ephemeral: false,
                lifetime: None,
                tags: owner.map(tag).into_iter().collect(),
                user: owner.is_none().then(|| user.unwrap_or_default()),
            };
            admin::create_key(draft, request)?;
            let enrolment = Enrolment {
                machine: MachinePublic([*n; 32]),
                key: NodePublic([*n; 32]),
                secret: Presented::parse(&secret)?,
                name: String::new(),
                host: HostInfo::default(),
            };
            registry::enroll(draft, enrolment).map(drop)
        }
        Step::Tag(n, to) => admin::tag_node(draft, &id(draft, *n), &[tag(*to)]).map(drop),
        Step::Rename(n) => admin::rename_node(draft, &id(draft, *n), "other").map(drop),
        Step::Endpoint(n, port) => {
            let node = id(draft, *n).parse().map_or(NodeId(0), NodeId);
            registry::report(draft, node, &[([192, 0, 2, *n], *port).into()], &[])
        }
        Step::Offer(n, yes) => {
            let node = id(draft, *n).parse().map_or(NodeId(0), NodeId);
            let offered = yes.then(|| "10.0.0.0/8".parse().unwrap());
            registry::report(draft, node, &[], offered.as_slice())
        }
        Step::Approve(n, yes) => {
            let approved: Vec<String> = yes.then(|| "10.0.0.0/8".to_owned()).into_iter().collect();
            admin::approve_routes(draft, &id(draft, *n), &approved).map(drop)
        }
        Step::Expire(n) => admin::expire_node(draft, &id(draft, *n)).map(drop),
        Step::Delete(n) => admin::delete_node(draft, &id(draft, *n)).map(drop),
        Step::Policy(n) => admin::set_policy(
            draft,
            NewPolicy {
                text: POLICIES[*n].to_owned(),
                ..NewPolicy::default()
            },
        )
        .map(drop),
        Step::User(n) => {
            admin::create_user(draft, &format!("user{n}@example.org"), "", "").map(drop)
        }
    }
}

fn first_world() -> Arc<Current> {
    let founding = founding();
    let loaded = Loaded {
        mesh: founding.mesh,
        coordinator: founding.coordinator,
        epoch: mesh_core::node::Epoch(1),
        generation: Generation(1),
        next_id: 1,
        users: std::collections::BTreeMap::new(),
        nodes: std::collections::BTreeMap::new(),
        keys: std::collections::BTreeMap::new(),
        policy: None,
        last_seen: std::collections::BTreeMap::new(),
    };
    Arc::new(Current::load(loaded, None).unwrap())
}

proptest! {
    /// Were this wrong, a node would go on with an old map and an old policy.
    #[test]
    fn a_node_whom_a_change_does_not_concern_has_the_same_map(
        steps in proptest::collection::vec(step(), 1..40),
    ) {
        let mut worlds = vec![first_world()];
        for step in &steps {
            let current = worlds.last().unwrap();
            let mut draft = Draft::of(current, UnixTime(100));
            if take(&mut draft, step).is_ok() && !draft.writes.is_empty() {
                let to = Generation(current.world.generation.0 + 1);
                worlds.push(Arc::new(draft.finish(current, to)));
            }
        }
        for (at, before) in worlds.iter().enumerate() {
            for now in &worlds[at..] {
                let both = before.world.nodes.keys().chain(now.world.nodes.keys());
                for id in both.copied().collect::<BTreeSet<_>>() {
                    if now.may_concern(id, before) {
                        continue;
                    }
                    let map = |current: &Current| {
                        let map = build::build(&current.world, &current.compiled, id);
                        map.map(|map| map.digest())
                    };
                    prop_assert_eq!(map(now), map(before), "node {} after {:?}", id, steps);
                }
            }
        }
    }
}
