//! What the host tells the init of the virtual machine to do, and the words init answers with.
//!
//! Written once and compiled into both ends; the answer travels over a serial line among the
//! output of tests, so its lines carry a prefix that no test prints.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Where the plan lies in the initramfs.
pub(crate) const PLAN_PATH: &str = "/plan.json";

/// Opens every line of init's own on the report line.
pub(crate) const PREFIX: &str = "vm: ";

/// Follows [`PREFIX`] once init runs: from here on a failure is a result, not a flaky boot.
pub(crate) const BOOTED: &str = "booted ";

/// The last line of a run in which every step passed.
pub(crate) const SUCCESS: &str = "init: success";

/// The last line of a run in which something failed.
pub(crate) const FAILURE: &str = "init: failure";

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Plan {
    /// Paths of kernel modules, each after those it depends on.
    pub(crate) modules: Vec<String>,
    /// Files under `/proc/sys` and what to write there.
    pub(crate) sysctls: BTreeMap<String, String>,
    pub(crate) environment: BTreeMap<String, String>,
    pub(crate) steps: Vec<Step>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Step {
    pub(crate) name: String,
    pub(crate) command: Vec<String>,
    pub(crate) environment: BTreeMap<String, String>,
    /// After so many seconds everything that the step started is killed.
    pub(crate) limit_seconds: u64,
}
