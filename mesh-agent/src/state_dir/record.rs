//! What is in the state files, and how the parts must agree.
//!
//! The files may come from different moments or different machines (a careless restore), so each
//! names the machine key that it belongs to and the netmap must be this node's own.

use std::collections::BTreeSet;
use std::io;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use ipnet::IpNet;
use mesh_api::v1;
use mesh_core::agent::{Memory, Prefs};
use mesh_core::control::{Chain, Keys, Membership};
use mesh_core::key::{MachineKey, MachinePublic, NodeKey};
use mesh_core::node::{MeshId, NodeId, UnixTime};
use prost::Message as _;
use rand_core::RngCore as _;
use serde::{Deserialize, Serialize};
use zeroize::{Zeroize, ZeroizeOnDrop, Zeroizing};

use super::{Found, StateDir, Unusable};
use crate::control::accept;

const KEYS: &str = "keys";
const NODE: &str = "node";
const NETMAP: &str = "netmap";

/// What to do when a file is damaged; said wherever one is refused.
const HINT: &str = "restore the state folder from a backup, or, to enroll this machine as a new node, \
     stop the agent, move the folder away and run `mesh up --join … --auth-key …`";

/// Who this machine is: made once, here, and never sent.
#[derive(Clone, Debug)]
pub struct Identity {
    pub keys: Keys,
    /// WireGuard's UDP port, remembered so that peers' and routers' tables stay good.
    pub listen_port: u16,
}

/// All that the disk holds.
#[derive(Debug)]
pub struct Loaded {
    pub identity: Identity,
    pub memory: Memory,
    /// What was wrong and could be done without, for the health report.
    pub damage: Vec<String>,
    pub remembered: Remembered,
}

#[derive(Serialize, Deserialize, Zeroize, ZeroizeOnDrop)]
struct KeysRecord {
    machine: String,
    node: String,
    listen_port: u16,
}

#[derive(Serialize, Deserialize, Default, Clone, PartialEq, Eq, Debug)]
struct NodeRecord {
    /// Public machine key that this record belongs to.
    machine: String,
    up: bool,
    join: String,
    coordinator: Option<String>,
    advertised_routes: BTreeSet<IpNet>,
    mesh: Option<String>,
    node: Option<u64>,
    clock: Option<ClockRecord>,
}

/// The coordinator's clock, and this machine's at the same moment.
#[derive(Serialize, Deserialize, Clone, Copy, PartialEq, Eq, Debug)]
struct ClockRecord {
    coordinator: u64,
    local: u64,
}

/// What the files hold now: only differences are written.
#[derive(Debug, Default)]
pub struct Remembered {
    machine: String,
    node: Option<NodeRecord>,
    links: Vec<Arc<[u8]>>,
    /// The files in place are whole, so they may become the version before.
    node_whole: bool,
    netmap_whole: bool,
}

impl StateDir {
    /// Reads everything. On a machine without state, makes keys; nowhere else.
    pub fn load(&self, port: impl FnOnce() -> u16) -> Result<Loaded, Unusable> {
        let mut damage = Vec::new();
        let mut whole = |name: &str| -> Result<(Option<Vec<u8>>, bool), Unusable> {
            match self.find(name)? {
                Found::Absent => Ok((None, true)),
                Found::Good(payload) => Ok((Some(payload), true)),
                Found::Previous(payload, reason) => {
                    damage.push(format!("{reason}; the version before it is in use"));
                    Ok((Some(payload), false))
                }
                Found::Corrupt(reason) if name == NETMAP => {
                    damage.push(format!(
                        "{reason}; the coordinator will be asked for a fresh one"
                    ));
                    Ok((None, false))
                }
                Found::Corrupt(reason) => Err(Unusable::Corrupt(format!("{reason}; {HINT}"))),
            }
        };
        let (keys, _) = whole(KEYS)?;
        let (node, node_whole) = whole(NODE)?;
        let (netmap, netmap_whole) = whole(NETMAP)?;

        let identity = match keys {
            Some(payload) => read_keys(&payload)?,
            None if node.is_none() && netmap.is_none() && netmap_whole => {
                self.make_identity(port())?
            }
            None => {
                let text = format!("the state folder holds a node but not its keys; {HINT}");
                return Err(Unusable::Corrupt(text));
            }
        };
        let machine = identity.keys.machine.public().to_string();
        let node = match node {
            Some(payload) => Some(read_node(&payload, &machine)?),
            None => None,
        };
        let mut memory = node
            .as_ref()
            .map(|record| memory(record, local_clock()))
            .unwrap_or_default();
        let mut links = Vec::new();
        let mut netmap_whole = netmap_whole;
        if let Some(payload) = netmap {
            match read_chain(&payload, &memory, &identity) {
                Ok(chain) => {
                    links = chain.links().to_vec();
                    memory.chain = Some(chain);
                }
                Err(reason) => {
                    netmap_whole = false;
                    damage.push(format!(
                        "the stored netmap is not usable: {reason}; the coordinator will be asked for a fresh one"
                    ));
                }
            }
        }
        Ok(Loaded {
            identity,
            memory,
            damage,
            remembered: Remembered {
                machine,
                node,
                links,
                node_whole,
                netmap_whole,
            },
        })
    }

    fn make_identity(&self, listen_port: u16) -> Result<Identity, Unusable> {
        let identity = Identity {
            keys: Keys {
                machine: MachineKey::from_seed(random()),
                node: NodeKey::from_seed(random()),
            },
            listen_port,
        };
        let record = KeysRecord {
            machine: BASE64_STANDARD.encode(identity.keys.machine.expose()),
            node: BASE64_STANDARD.encode(identity.keys.node.expose()),
            listen_port,
        };
        let payload = Zeroizing::new(json(&record));
        self.write(KEYS, &payload, true)
            .map_err(|source| Unusable::Io {
                context: "write the keys of this node".to_owned(),
                source,
            })?;
        Ok(identity)
    }

    /// Brings the files to `memory`. Idempotent; on error the files before stay good.
    pub fn remember(&self, memory: &Memory, remembered: &mut Remembered) -> io::Result<()> {
        let record = record(memory, &remembered.machine, local_clock());
        if remembered
            .node
            .as_ref()
            .is_none_or(|old| differs(old, &record))
        {
            self.write(NODE, &json(&record), remembered.node_whole)?;
            remembered.node = Some(record);
            remembered.node_whole = true;
        }
        let links = memory.chain.as_ref().map_or(&[][..], Chain::links);
        if links == remembered.links {
            return Ok(());
        }
        if links.is_empty() {
            self.remove(NETMAP)?;
        } else {
            self.write(NETMAP, &encode_links(links), remembered.netmap_whole)?;
        }
        remembered.links = links.to_vec();
        remembered.netmap_whole = true;
        Ok(())
    }
}

// === keys ===

fn random() -> [u8; 32] {
    let mut seed = [0; 32];
    rand_core::OsRng.fill_bytes(&mut seed);
    seed
}

fn read_keys(payload: &[u8]) -> Result<Identity, Unusable> {
    let corrupt = || Unusable::Corrupt(format!("the keys file cannot be read; {HINT}"));
    let record: KeysRecord = serde_json::from_slice(payload).map_err(|_| corrupt())?;
    let key = |text: &str| -> Option<[u8; 32]> {
        let bytes = Zeroizing::new(BASE64_STANDARD.decode(text).ok()?);
        bytes.as_slice().try_into().ok()
    };
    Ok(Identity {
        keys: Keys {
            machine: MachineKey::from_seed(key(&record.machine).ok_or_else(corrupt)?),
            node: NodeKey::from_seed(key(&record.node).ok_or_else(corrupt)?),
        },
        listen_port: record.listen_port,
    })
}

// === node ===

fn read_node(payload: &[u8], machine: &str) -> Result<NodeRecord, Unusable> {
    let record: NodeRecord = serde_json::from_slice(payload)
        .map_err(|_| Unusable::Corrupt(format!("the node file cannot be read; {HINT}")))?;
    if record.machine != machine {
        let text = format!("the node file belongs to another machine's keys; {HINT}");
        return Err(Unusable::Corrupt(text));
    }
    Ok(record)
}

fn memory(record: &NodeRecord, local: u64) -> Memory {
    let mesh = record.mesh.as_deref().and_then(|text| {
        let mut id = [0; 16];
        hex::decode_to_slice(text, &mut id)
            .ok()
            .map(|()| MeshId(id))
    });
    Memory {
        prefs: Prefs {
            up: record.up,
            join: record.join.clone(),
            coordinator: record
                .coordinator
                .as_deref()
                .and_then(|key| key.parse().ok()),
            advertised_routes: record.advertised_routes.clone(),
        },
        membership: mesh.zip(record.node).map(|(mesh, node)| Membership {
            mesh,
            node: NodeId(node),
        }),
        chain: None,
        // However far the local clock was set back meanwhile, the coordinator's has not gone back.
        clock: record.clock.map(|clock| {
            let passed = local.saturating_sub(clock.local);
            UnixTime(clock.coordinator.saturating_add(passed))
        }),
    }
}

fn record(memory: &Memory, machine: &str, local: u64) -> NodeRecord {
    let Memory {
        prefs,
        membership,
        chain: _,
        clock,
    } = memory;
    NodeRecord {
        machine: machine.to_owned(),
        up: prefs.up,
        join: prefs.join.clone(),
        coordinator: prefs.coordinator.map(|key| key.to_string()),
        advertised_routes: prefs.advertised_routes.clone(),
        mesh: membership.map(|membership| membership.mesh.to_string()),
        node: membership.map(|membership| membership.node.0),
        clock: clock.map(|clock| ClockRecord {
            coordinator: clock.0,
            local,
        }),
    }
}

/// Whether `new` is worth a write: the clock alone is, when it was corrected or once in a while.
fn differs(old: &NodeRecord, new: &NodeRecord) -> bool {
    const WHILE: u64 = 600;
    let with_clock = |record: &NodeRecord, clock| NodeRecord {
        clock,
        ..record.clone()
    };
    if with_clock(old, None) != with_clock(new, None) {
        return true;
    }
    match (old.clock, new.clock) {
        (Some(old), Some(new)) => {
            let passed = new.local.abs_diff(old.local);
            passed > WHILE || new.coordinator.abs_diff(old.coordinator).abs_diff(passed) > 5
        }
        (old, new) => old != new,
    }
}

/// Seconds since 1970 by this machine's clock; only ever compared with itself.
fn local_clock() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}

// === netmap ===

/// Each link with its length in front, big-endian.
fn encode_links(links: &[Arc<[u8]>]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for link in links {
        bytes.extend_from_slice(&(link.len() as u64).to_be_bytes());
        bytes.extend_from_slice(link);
    }
    bytes
}

fn decode_links(mut bytes: &[u8]) -> Option<Vec<&[u8]>> {
    let mut links = Vec::new();
    while !bytes.is_empty() {
        let (length, rest) = bytes.split_first_chunk()?;
        let length = usize::try_from(u64::from_be_bytes(*length)).ok()?;
        let (link, rest) = rest.split_at_checked(length)?;
        links.push(link);
        bytes = rest;
    }
    Some(links)
}

fn read_chain(payload: &[u8], memory: &Memory, identity: &Identity) -> Result<Chain, String> {
    let coordinator = memory
        .prefs
        .coordinator
        .ok_or("the coordinator's key is not known")?;
    let membership = memory.membership.ok_or("this machine is not a node")?;
    let links = decode_links(payload).ok_or("it is not a chain of updates")?;
    let chain = replay(&coordinator, membership, &links)?;
    if chain.netmap().me.key == identity.keys.node.public() {
        Ok(chain)
    } else {
        Err("it is of another node key".to_owned())
    }
}

/// The same checks as when the links first arrived.
fn replay(
    coordinator: &MachinePublic,
    membership: Membership,
    links: &[&[u8]],
) -> Result<Chain, String> {
    let mut chain: Option<Chain> = None;
    for link in links {
        let signed = v1::SignedUpdate::decode(*link).map_err(|error| error.to_string())?;
        let held = chain.as_ref();
        let next = accept(
            coordinator,
            Some(membership),
            held.map(|chain| &**chain.netmap()),
            &signed,
        )
        .and_then(|accepted| Chain::after(held, accepted))
        .map_err(|error| error.to_string())?;
        chain = Some(next);
    }
    chain.ok_or_else(|| "it is empty".to_owned())
}

fn json(record: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(record).expect("a record of plain fields can always be written")
}
