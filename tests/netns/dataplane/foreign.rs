//! Somebody else's program: two instructions, in an object made by hand.
//!
//! It says "pass, and ask nobody else", which is what a careless monitoring tool says.

use aya::Ebpf;
use aya::programs::tc::TcAttachOptions;
use aya::programs::{LinkOrder, SchedClassifier, TcAttachType};
use mesh_agent::dataplane::probe;
use mesh_tests::Host;

/// TC_ACT_OK: ends the chain of a TCX hook.
const PASS: i32 = 0;

/// A foreign program on the ingress of a host's mesh interface; gone with the value.
pub(super) struct Stranger<'a> {
    host: &'a Host,
    /// The priority of a clsact filter, where the kernel has no TCX.
    priority: &'static str,
    /// Holds the link.
    program: Option<Ebpf>,
}

impl<'a> Stranger<'a> {
    pub(super) fn before(host: &'a Host) -> Self {
        Self::attach(host, LinkOrder::first(), "1")
    }

    pub(super) fn behind(host: &'a Host) -> Self {
        Self::attach(host, LinkOrder::last(), "2")
    }

    fn attach(host: &'a Host, order: LinkOrder, priority: &'static str) -> Self {
        let mut stranger = Self {
            host,
            priority,
            program: None,
        };
        if probe::has_tcx() {
            stranger.program = Some(Self::link(host, order));
        } else {
            // Matches everything, and has no action but to let it pass.
            let program = ["bytecode", "1,6 0 0 4294967295,", "flowid", "1:1"];
            stranger.filter("add", &program);
        }
        stranger
    }

    fn filter(&self, verb: &str, program: &[&str]) {
        let mut arguments = vec!["filter", verb, "dev", "mesh0", "ingress", "protocol", "all"];
        arguments.extend(["pref", self.priority, "handle", "1", "bpf"]);
        arguments.extend(program);
        self.host.run("tc", &arguments).unwrap();
    }

    fn link(host: &Host, order: LinkOrder) -> Ebpf {
        let mut ebpf = Ebpf::load(&object(PASS)).unwrap();
        host.inside(|| {
            let program: &mut SchedClassifier =
                ebpf.program_mut("stranger").unwrap().try_into().unwrap();
            program.load().unwrap();
            let options = TcAttachOptions::TcxOrder(order);
            program
                .attach_with_options("mesh0", TcAttachType::Ingress, options)
                .unwrap();
        })
        .unwrap();
        ebpf
    }
}

impl Drop for Stranger<'_> {
    fn drop(&mut self) {
        if self.program.take().is_none() {
            self.filter("del", &[]);
        }
    }
}

/// Name, type, flags, link, info, entry size, content.
type Section<'a> = (u32, u32, u64, u32, u32, u64, &'a [u8]);

/// A relocatable ELF object for BPF with one classifier that returns `verdict`.
fn object(verdict: i32) -> Vec<u8> {
    let mut code = vec![0xb7, 0, 0, 0];
    code.extend(verdict.to_le_bytes());
    code.extend([0x95, 0, 0, 0, 0, 0, 0, 0]);

    let names = b"\0classifier\0license\0.symtab\0.strtab\0stranger\0".to_vec();
    let name = |wanted: &str| {
        let at = names
            .windows(wanted.len())
            .position(|w| w == wanted.as_bytes());
        u32::try_from(at.unwrap()).unwrap()
    };
    let mut symbols = vec![0; 24];
    symbols.extend(name("stranger").to_le_bytes());
    // STB_GLOBAL and STT_FUNC, default visibility, in section 1.
    symbols.extend([0x12, 0, 1, 0]);
    symbols.extend(0_u64.to_le_bytes());
    symbols.extend((code.len() as u64).to_le_bytes());

    let sections: [Section<'_>; 5] = [
        (0, 0, 0, 0, 0, 0, &[]),
        (name("classifier"), 1, 6, 0, 0, 0, &code),
        (name("license"), 1, 3, 0, 0, 0, b"GPL\0"),
        (name(".symtab"), 2, 0, 4, 1, 24, &symbols),
        (name(".strtab"), 3, 0, 0, 0, 0, &names),
    ];
    const HEADER: usize = 64;
    let mut body = Vec::new();
    let mut table = Vec::new();
    for (name, kind, flags, link, info, entry, content) in sections {
        body.resize(body.len().next_multiple_of(8), 0);
        table.extend(name.to_le_bytes());
        table.extend(kind.to_le_bytes());
        table.extend(flags.to_le_bytes());
        table.extend(0_u64.to_le_bytes());
        table.extend(((HEADER + body.len()) as u64).to_le_bytes());
        table.extend((content.len() as u64).to_le_bytes());
        table.extend(link.to_le_bytes());
        table.extend(info.to_le_bytes());
        table.extend(8_u64.to_le_bytes());
        table.extend(entry.to_le_bytes());
        body.extend(content);
    }
    body.resize(body.len().next_multiple_of(8), 0);

    // 64 bits, little-endian, version 1.
    let mut elf = b"\x7fELF\x02\x01\x01".to_vec();
    elf.resize(16, 0);
    // Relocatable, for BPF, version 1.
    elf.extend([1, 0, 247, 0, 1, 0, 0, 0]);
    elf.extend([0; 16]);
    elf.extend(((HEADER + body.len()) as u64).to_le_bytes());
    elf.extend([0; 4]);
    // Sizes and counts: this header, no segments, five sections, names in the last.
    elf.extend([64, 0, 0, 0, 0, 0, 64, 0, 5, 0, 4, 0]);
    elf.extend(body);
    elf.extend(table);
    elf
}
