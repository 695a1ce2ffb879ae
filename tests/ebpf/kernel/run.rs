//! Packets through the programs, by BPF_PROG_TEST_RUN.

use aya::programs::SchedClassifier;
use aya::{TestRun, TestRunOptions};
use mesh_common::DropReason;
use mesh_common::maps;
use mesh_core::Direction;

use super::Kernel;
use crate::oracle::Outcome;

/// TCX_NEXT and TC_ACT_SHOT.
const NEXT: u32 = u32::MAX;
const DROP: u32 = 2;

impl Kernel {
    /// Runs a program that the agent does not attach.
    pub(crate) fn explain(&mut self, name: &'static str, packet: &[u8]) -> (u32, Vec<u8>, u128) {
        self.load_program(name);
        self.run_program(name, packet, 1)
    }

    /// A program, loaded if it was not.
    pub(crate) fn load_program(&mut self, name: &'static str) -> &SchedClassifier {
        self.dataplane().load_program(name).unwrap()
    }

    /// The programs, for whoever runs many packets, or on several threads.
    pub(crate) fn runner(&self) -> Runner<'_> {
        let program = |name| self.dataplane.as_ref().expect("started").program(name);
        Runner {
            ingress: program("mesh_in").expect("a loaded program"),
            egress: program("mesh_eg").expect("a loaded program"),
        }
    }

    /// Whether the program lets the packet pass; and the packet as it comes out.
    pub(crate) fn run(&self, direction: Direction, packet: &[u8]) -> (bool, Vec<u8>) {
        let name = match direction {
            Direction::Ingress => "mesh_in",
            Direction::Egress => "mesh_eg",
        };
        let (value, out, _) = self.run_program(name, packet, 1);
        match value {
            NEXT => (true, out),
            DROP => (false, out),
            other => panic!("{name} returned {other}"),
        }
    }

    /// What the program returned, the packet that came out, and nanoseconds per run.
    pub(crate) fn run_program(
        &self,
        name: &str,
        packet: &[u8],
        repeat: u32,
    ) -> (u32, Vec<u8>, u128) {
        let dataplane = self.dataplane.as_ref().expect("started");
        let program = dataplane.program(name).expect("a loaded program");
        let mut out = vec![0; 4096];
        let result = program
            .test_run(TestRunOptions {
                data_in: Some(packet),
                data_out: Some(&mut out),
                repeat,
                ..TestRunOptions::default()
            })
            .unwrap_or_else(|error| panic!("run {name} on {} bytes: {error}", packet.len()));
        out.truncate(result.data_size_out as usize);
        (result.return_value, out, result.duration.as_nanos())
    }

    /// What the program returned for a packet of which the kernel says so many segments of this size.
    pub(crate) fn run_super_packet(&self, name: &str, packet: &[u8], count: u32, size: u32) -> u32 {
        // `gso_segs` and `gso_size` in `struct __sk_buff` (linux/bpf.h).
        let mut context = [0; 192];
        context[164..168].copy_from_slice(&count.to_ne_bytes());
        context[176..180].copy_from_slice(&size.to_ne_bytes());
        let dataplane = self.dataplane.as_ref().expect("started");
        let program = dataplane.program(name).expect("a loaded program");
        let options = TestRunOptions {
            data_in: Some(packet),
            ctx_in: Some(&context),
            ..TestRunOptions::default()
        };
        program.test_run(options).expect("a run").return_value
    }

    /// What becomes of the packet, by the counters: all other reasons' stay as they were.
    pub(crate) fn outcome(&mut self, direction: Direction, packet: &[u8]) -> Outcome {
        let before = self.dataplane().counters().unwrap();
        let (passes, _) = self.run(direction, packet);
        let after = self.dataplane().counters().unwrap();
        if passes {
            assert_eq!(after.dropped, before.dropped);
            return Ok(());
        }
        let mut reasons = Vec::new();
        for ((way, reason), count) in after.dropped {
            let old = before
                .dropped
                .get(&(way, reason))
                .copied()
                .unwrap_or_default();
            if count != old {
                assert_eq!((way, count.packets), (direction, old.packets + 1));
                reasons.push(reason.name());
            }
        }
        assert_eq!(reasons.len(), 1, "{reasons:?}");
        Err(reasons[0])
    }

    /// Whether one more packet was dropped for this reason than when it was last asked for.
    pub(crate) fn is_counted(&mut self, direction: Direction, reason: &str) -> bool {
        let reason = DropReason::ALL.iter().find(|r| r.name() == reason).copied();
        let reason = reason.expect("the oracle and the counters use the same words");
        let slot = maps::reason_slot(Some(reason), direction);
        let counts = self.reasons.as_ref().unwrap().get(&slot, 0).unwrap();
        let now = counts.iter().map(|count| count.packets).sum();
        let before = self.counted.insert(slot, now).unwrap_or_default();
        now == before + 1
    }
}

/// Runs packets without asking for what comes out.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Runner<'a> {
    ingress: &'a SchedClassifier,
    egress: &'a SchedClassifier,
}

impl Runner<'_> {
    pub(crate) fn passes(&self, direction: Direction, packet: &[u8]) -> bool {
        match self.repeat(direction, packet, 1) {
            NEXT => true,
            DROP => false,
            other => panic!("a program returned {other}"),
        }
    }

    /// What the last of so many runs returned.
    pub(crate) fn repeat(&self, direction: Direction, packet: &[u8], repeat: u32) -> u32 {
        let program = match direction {
            Direction::Ingress => self.ingress,
            Direction::Egress => self.egress,
        };
        let options = TestRunOptions {
            data_in: Some(packet),
            repeat,
            ..TestRunOptions::default()
        };
        program.test_run(options).unwrap().return_value
    }
}
