//! What the host tells the init of the virtual machine to do, and the words init answers with.
//!
//! Written once and compiled into both ends; the answer travels over a serial line among the
//! output of tests, so its lines carry a prefix that no test prints.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Where the plan lies in the initramfs.
pub const PLAN_PATH: &str = "/plan.json";

/// Opens every line of init's own on the report line.
pub const PREFIX: &str = "vm: ";

/// Follows [`PREFIX`] once init runs: from here on a failure is a result, not a flaky boot.
pub const BOOTED: &str = "booted ";

/// Follow [`PREFIX`] around each step: its name, then ` ... ` and a verdict that is `ok` or not.
pub const BEGIN: &str = "begin ";
pub const END: &str = "end ";

/// The last line of a run in which every step passed.
pub const SUCCESS: &str = "init: success";

/// The last line of a run in which something failed.
pub const FAILURE: &str = "init: failure";

#[derive(Debug, Serialize, Deserialize)]
pub struct Plan {
    /// Paths of kernel modules, each after those it depends on.
    pub modules: Vec<String>,
    /// Files under `/proc/sys` and what to write there.
    pub sysctls: BTreeMap<String, String>,
    pub environment: BTreeMap<String, String>,
    pub steps: Vec<Step>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Step {
    pub name: String,
    pub command: Vec<String>,
    pub environment: BTreeMap<String, String>,
    /// After so many seconds everything that the step started is killed.
    pub limit_seconds: u64,
}
