//! WireGuard, by the kernel or in process.
//!
//! Both backends are told the same steps and observed through the same status; what differs is
//! who encrypts. The interface comes into being down and is brought up by [`crate::net`] once the
//! packet filter hangs on it.

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Context as _;
use mesh_core::Direction;
use mesh_core::wireguard::{DeviceOp, DeviceStatus};
use tracing::info;

pub mod kernel;
pub mod tun;
pub mod userspace;

/// Which backend to take.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Choice {
    /// The kernel's where it has one, else in process.
    #[default]
    Auto,
    Kernel,
    Userspace,
}

/// Where WireGuard's userspace socket protocol is looked for by `wg`.
pub const UAPI_DIR: &str = "/var/run/wireguard";

#[derive(Clone, Debug)]
pub struct OpenOptions {
    /// Name of the interface, 1 to 15 bytes.
    pub name: String,
    /// Bytes of an inner packet at most.
    pub mtu: u32,
    /// Mark of every encrypted packet.
    pub fwmark: u32,
    /// Judges every inner packet where no BPF program does; userspace backend only.
    pub filter: Option<Filter>,
    /// Folder of the `NAME.sock` that `wg show` speaks to; `None` opens none.
    pub uapi_dir: Option<PathBuf>,
}

/// What to do with an inner packet. It may be changed in place (MSS clamping).
#[derive(Clone)]
pub struct Filter(Arc<Judge>);

type Judge = dyn Fn(Direction, &mut [u8]) -> Judgement + Send + Sync;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Judgement {
    Pass,
    Drop,
}

impl Filter {
    pub fn new(judge: impl Fn(Direction, &mut [u8]) -> Judgement + Send + Sync + 'static) -> Self {
        Self(Arc::new(judge))
    }

    fn judge(&self, direction: Direction, packet: &mut [u8]) -> Judgement {
        (self.0)(direction, packet)
    }
}

impl std::fmt::Debug for Filter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Filter")
    }
}

/// A network interface.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Interface {
    pub name: String,
    pub index: u32,
}

/// The WireGuard device of this node.
#[derive(Debug)]
pub enum Backend {
    Kernel(kernel::Device),
    Userspace(userspace::Device),
}

impl Backend {
    /// Creates the device, down; a kernel device of that name is adopted with all it holds.
    pub async fn open(choice: Choice, options: &OpenOptions) -> anyhow::Result<Self> {
        let kernel = match choice {
            Choice::Auto => kernel::is_supported().await,
            Choice::Kernel => true,
            Choice::Userspace => false,
        };
        let backend = if kernel {
            let device = kernel::Device::open(options).await;
            Self::Kernel(device.context("open the kernel's WireGuard device")?)
        } else {
            let device = userspace::Device::open(options);
            Self::Userspace(device.context("open the userspace WireGuard device")?)
        };
        info!(
            backend = backend.kind(),
            interface = backend.interface().name,
            "WireGuard device ready"
        );
        Ok(backend)
    }

    /// `kernel` or `userspace`.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Kernel(_) => "kernel",
            Self::Userspace(_) => "userspace",
        }
    }

    pub fn interface(&self) -> Interface {
        match self {
            Self::Kernel(device) => device.interface().clone(),
            Self::Userspace(device) => device.interface().clone(),
        }
    }

    /// What the device holds now.
    pub async fn status(&self) -> anyhow::Result<DeviceStatus> {
        match self {
            Self::Kernel(device) => device.status().await.context("read the device"),
            Self::Userspace(device) => Ok(device.status()),
        }
    }

    /// Takes `ops` in order. After an error the device holds a part of them: observe and reconcile.
    pub async fn apply(&self, ops: &[DeviceOp]) -> anyhow::Result<()> {
        match self {
            Self::Kernel(device) => device.apply(ops).await,
            Self::Userspace(device) => device.apply(ops),
        }
    }
}
