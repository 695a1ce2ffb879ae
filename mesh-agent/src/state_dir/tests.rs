//! The state folder against careless hands, bad disks and full ones.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::PermissionsExt as _;

use mesh_api::update::{sign_delta, sign_full};
use mesh_core::agent::{Memory, Prefs};
use mesh_core::control::{Chain, Membership};
use mesh_core::key::{MachineKey, NodePublic};
use mesh_core::netmap::{Me, Netmap, NodePolicy, delta};
use mesh_core::node::{Addresses, Epoch, Generation, MeshId, Name, NodeId, UnixTime};
use mesh_core::world::{Mesh, Pools};
use proptest::prelude::*;

use super::*;
use crate::control::accept;

const MEMBER: Membership = Membership {
    mesh: MeshId([7; 16]),
    node: NodeId(3),
};

fn coordinator() -> MachineKey {
    MachineKey::from_seed([9; 32])
}

fn load(folder: &Path) -> Result<Loaded, Unusable> {
    StateDir::open(folder).unwrap().load(|| 41_641)
}

fn netmap(key: NodePublic, generation: u64) -> Netmap {
    Netmap {
        mesh: Mesh {
            id: MEMBER.mesh,
            domain: "mesh.internal".to_owned(),
            pools: Pools {
                v4: Pools::default_v4(),
                v6: Pools::ula([1; 5]),
            },
        },
        epoch: Epoch(0),
        generation: Generation(generation),
        me: Me {
            id: MEMBER.node,
            name: Name::parse(&format!("me-{generation}")).unwrap(),
            key,
            addresses: Addresses {
                v4: [100, 64, 0, 1].into(),
                v6: [0xfd01, 0, 0, 0, 0, 0, 0, 1].into(),
            },
            tags: BTreeSet::new(),
            user: None,
            expires: None,
            expired: false,
        },
        peers: BTreeMap::new(),
        policy: NodePolicy::default(),
    }
}

/// A chain as it arrives: a full map and a delta.
fn chain(signer: &MachineKey, key: NodePublic) -> Chain {
    let (first, second) = (netmap(key, 1), netmap(key, 2));
    let full = sign_full(signer, &first);
    let step = sign_delta(
        signer,
        first.digest(),
        &delta::diff(&first, &second),
        &second,
    );
    [full, step]
        .iter()
        .fold(None, |held: Option<Chain>, signed| {
            let map = held.as_ref().map(|held| &**held.netmap());
            let accepted = accept(&signer.public(), Some(MEMBER), map, signed).unwrap();
            Some(Chain::after(held.as_ref(), accepted).unwrap())
        })
        .unwrap()
}

fn memory(loaded: &Loaded) -> Memory {
    Memory {
        prefs: Prefs {
            up: true,
            join: "mesh://h:1?pin=sha256:00".to_owned(),
            coordinator: Some(coordinator().public()),
            advertised_routes: ["10.1.0.0/16".parse().unwrap()].into(),
        },
        membership: Some(MEMBER),
        chain: Some(chain(&coordinator(), loaded.identity.keys.node.public())),
        clock: Some(UnixTime(1_000)),
    }
}

/// A folder of a node that is enrolled and has a netmap.
fn enrolled() -> (tempfile::TempDir, Memory) {
    let folder = tempfile::tempdir().unwrap();
    let mut loaded = load(folder.path()).unwrap();
    let memory = memory(&loaded);
    StateDir::open(folder.path())
        .unwrap()
        .remember(&memory, &mut loaded.remembered)
        .unwrap();
    (folder, memory)
}

#[test]
fn a_new_machine_makes_keys_once() {
    let folder = tempfile::tempdir().unwrap();
    let first = load(folder.path()).unwrap();
    let second = load(folder.path()).unwrap();
    assert_eq!(
        first.identity.keys.machine.public(),
        second.identity.keys.machine.public()
    );
    assert_eq!(second.identity.listen_port, 41_641);
    assert!(second.memory.membership.is_none());
}

#[test]
fn nobody_else_may_read_the_folder_or_its_files() {
    let (folder, _) = enrolled();
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(folder.path()), 0o700);
    for name in ["keys", "node", "netmap"] {
        assert_eq!(mode(&folder.path().join(name)), 0o600, "{name}");
    }
    fs::set_permissions(folder.path().join("keys"), Permissions::from_mode(0o644)).unwrap();
    load(folder.path()).unwrap();
    assert_eq!(mode(&folder.path().join("keys")), 0o600);
}

#[test]
fn what_was_remembered_comes_back_verified() {
    let (folder, memory) = enrolled();
    let loaded = load(folder.path()).unwrap();
    assert_eq!(loaded.memory.prefs, memory.prefs);
    assert_eq!(loaded.memory.membership, memory.membership);
    assert!(loaded.memory.clock.unwrap() >= UnixTime(1_000));
    let chain = loaded.memory.chain.unwrap();
    assert_eq!(chain.netmap(), memory.chain.unwrap().netmap());
    assert_eq!(chain.links().len(), 2);
    assert!(loaded.damage.is_empty());
}

#[test]
fn damaged_keys_are_refused_with_a_hint_and_never_replaced() {
    for damage in [&b""[..], b"garbage", b"mesh-agent state v1\nshort"] {
        let (folder, _) = enrolled();
        let keys = folder.path().join("keys");
        fs::write(&keys, damage).unwrap();
        let Err(Unusable::Corrupt(text)) = load(folder.path()) else {
            panic!("{damage:?} was taken");
        };
        assert!(text.contains("restore the state folder"), "{text}");
        assert_eq!(fs::read(&keys).unwrap(), damage);
    }
}

#[test]
fn missing_keys_beside_a_node_are_no_new_machine() {
    let (folder, _) = enrolled();
    fs::remove_file(folder.path().join("keys")).unwrap();
    assert!(matches!(load(folder.path()), Err(Unusable::Corrupt(_))));
}

#[test]
fn a_node_file_of_another_machine_is_refused() {
    let (folder, _) = enrolled();
    let (other, _) = enrolled();
    fs::copy(other.path().join("node"), folder.path().join("node")).unwrap();
    assert!(matches!(load(folder.path()), Err(Unusable::Corrupt(_))));
}

#[test]
fn the_version_before_a_damaged_file_is_used() {
    let (folder, memory) = enrolled();
    let mut loaded = load(folder.path()).unwrap();
    let state = StateDir::open(folder.path()).unwrap();
    let mut newer = memory;
    newer.prefs.up = false;
    state.remember(&newer, &mut loaded.remembered).unwrap();
    fs::write(folder.path().join("node"), b"").unwrap();

    let mut loaded = load(folder.path()).unwrap();
    assert!(loaded.memory.prefs.up, "the version before");
    assert_eq!(loaded.damage.len(), 1);
    // And the damaged one does not push the good one out.
    state.remember(&newer, &mut loaded.remembered).unwrap();
    assert!(!load(folder.path()).unwrap().memory.prefs.up);
    fs::write(folder.path().join("node"), b"").unwrap();
    assert!(load(folder.path()).unwrap().memory.prefs.up);
}

#[test]
fn a_damaged_netmap_costs_the_netmap_only() {
    let (folder, _) = enrolled();
    let path = folder.path().join("netmap");
    let mut bytes = fs::read(&path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&path, bytes).unwrap();
    let loaded = load(folder.path()).unwrap();
    assert!(loaded.memory.chain.is_none());
    assert_eq!(loaded.memory.membership, Some(MEMBER));
    assert_eq!(loaded.damage.len(), 1);
}

#[test]
fn a_netmap_of_another_signer_or_another_node_key_is_not_used() {
    let stranger = NodePublic([4; 32]);
    for foreign in [
        |key, _| chain(&MachineKey::from_seed([8; 32]), key),
        |_, stranger| chain(&coordinator(), stranger),
    ] as [fn(NodePublic, NodePublic) -> Chain; 2]
    {
        let (folder, mut memory) = enrolled();
        let mut loaded = load(folder.path()).unwrap();
        let own = loaded.identity.keys.node.public();
        memory.chain = Some(foreign(own, stranger));
        StateDir::open(folder.path())
            .unwrap()
            .remember(&memory, &mut loaded.remembered)
            .unwrap();
        let loaded = load(folder.path()).unwrap();
        assert!(loaded.memory.chain.is_none());
        assert_eq!(loaded.damage.len(), 1, "{:?}", loaded.damage);
    }
}

#[test]
fn a_stop_between_the_two_renames_loses_nothing() {
    let (folder, _) = enrolled();
    for name in ["keys", "node", "netmap"] {
        let path = folder.path().join(name);
        fs::rename(&path, folder.path().join(format!("{name}.1"))).unwrap();
    }
    let loaded = load(folder.path()).unwrap();
    assert!(loaded.memory.chain.is_some());
    assert!(loaded.damage.is_empty());
}

#[test]
fn forgetting_the_netmap_removes_its_files() {
    let (folder, memory) = enrolled();
    let mut loaded = load(folder.path()).unwrap();
    let forgotten = Memory {
        chain: None,
        membership: None,
        ..memory
    };
    StateDir::open(folder.path())
        .unwrap()
        .remember(&forgotten, &mut loaded.remembered)
        .unwrap();
    assert!(!folder.path().join("netmap").exists());
    assert!(load(folder.path()).unwrap().memory.chain.is_none());
}

#[test]
fn the_clock_goes_on_while_the_agent_is_away_and_never_back() {
    let (folder, memory) = enrolled();
    let mut loaded = load(folder.path()).unwrap();
    let mut later = memory;
    later.clock = Some(UnixTime(5_000));
    StateDir::open(folder.path())
        .unwrap()
        .remember(&later, &mut loaded.remembered)
        .unwrap();
    let clock = load(folder.path()).unwrap().memory.clock.unwrap();
    assert!((5_000..5_060).contains(&clock.0), "{clock:?}");
}

#[test]
fn only_differences_are_written() {
    let (folder, memory) = enrolled();
    let mut loaded = load(folder.path()).unwrap();
    let state = StateDir::open(folder.path()).unwrap();
    let written = |name: &str| {
        use std::os::unix::fs::MetadataExt as _;
        fs::metadata(folder.path().join(name)).unwrap().ino()
    };
    state.remember(&memory, &mut loaded.remembered).unwrap();
    let before = (written("node"), written("netmap"));
    state.remember(&memory, &mut loaded.remembered).unwrap();
    assert_eq!((written("node"), written("netmap")), before);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever one does to one byte of one file, the identity stays or the state is refused.
    #[test]
    fn no_flipped_byte_makes_another_node(
        file in 0..3_usize,
        place in any::<prop::sample::Index>(),
        flip in 1..=255_u8,
    ) {
        let (folder, memory) = enrolled();
        let before = load(folder.path()).unwrap().identity.keys.machine.public();
        let path = folder.path().join(["keys", "node", "netmap"][file]);
        let mut bytes = fs::read(&path).unwrap();
        let place = place.index(bytes.len());
        bytes[place] ^= flip;
        fs::write(&path, bytes).unwrap();
        match load(folder.path()) {
            Err(Unusable::Corrupt(_)) => prop_assert!(file < 2),
            Err(Unusable::Io { .. }) => prop_assert!(false, "a damaged file is no I/O error"),
            Ok(loaded) => {
                prop_assert_eq!(file, 2);
                prop_assert_eq!(loaded.identity.keys.machine.public(), before);
                prop_assert_eq!(loaded.memory.membership, memory.membership);
                prop_assert!(loaded.memory.chain.is_none());
            }
        }
    }

    /// Truncated anywhere: the same.
    #[test]
    fn no_cut_makes_another_node(file in 0..3_usize, place in any::<prop::sample::Index>()) {
        let (folder, _) = enrolled();
        let path = folder.path().join(["keys", "node", "netmap"][file]);
        let bytes = fs::read(&path).unwrap();
        fs::write(&path, &bytes[..place.index(bytes.len())]).unwrap();
        match load(folder.path()) {
            Err(_) => prop_assert!(file < 2),
            Ok(loaded) => {
                prop_assert_eq!(file, 2);
                prop_assert!(loaded.memory.chain.is_none());
            }
        }
    }

    #[test]
    fn no_bytes_make_the_envelope_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        prop_assert!(open_envelope(&bytes).is_err());
    }
}

#[test]
fn a_full_disk_keeps_the_files_before() {
    let (folder, memory) = enrolled();
    let mut loaded = load(folder.path()).unwrap();
    let state = StateDir::open(folder.path()).unwrap();
    let before = fs::read(folder.path().join("node")).unwrap();
    // A folder in the temporary file's place fails the write as a full disk does.
    fs::create_dir(folder.path().join("node.tmp")).unwrap();
    let mut newer = memory;
    newer.prefs.up = false;
    assert!(state.remember(&newer, &mut loaded.remembered).is_err());
    assert_eq!(fs::read(folder.path().join("node")).unwrap(), before);
    fs::remove_dir(folder.path().join("node.tmp")).unwrap();
    state.remember(&newer, &mut loaded.remembered).unwrap();
    assert!(!load(folder.path()).unwrap().memory.prefs.up);
}
