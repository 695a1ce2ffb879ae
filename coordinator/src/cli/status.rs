//! `status`: the mesh at a glance.

use mesh_api::v1;
use serde_json::json;

use super::output::Output;
use super::{Admin, Failure, client};

pub(super) async fn run(admin: &Admin, output: &Output) -> Result<(), Failure> {
    let mut client = client::connect(admin).await?;
    let status = client.status(v1::StatusRequest {}).await?.into_inner();
    let mesh = status.mesh.unwrap_or_default();
    let pool = |prefix: Option<&v1::Prefix>| {
        let net = prefix.and_then(|prefix| ipnet::IpNet::try_from(prefix).ok());
        net.map(|net| net.to_string()).unwrap_or_default()
    };
    let (id, v4, v6) = (
        hex::encode(&mesh.id),
        pool(mesh.pool_v4.as_ref()),
        pool(mesh.pool_v6.as_ref()),
    );
    if admin.json {
        output.json(&json!({
            "version": status.version,
            "mesh": {"id": id, "domain": mesh.domain, "pool_v4": v4, "pool_v6": v6},
            "epoch": status.epoch,
            "generation": status.generation,
            "nodes": status.nodes,
            "connected": status.connected,
            "join": status.join,
            "problems": status.problems,
        }));
        return Ok(());
    }
    let (epoch, generation) = (status.epoch, status.generation);
    output.line(&format!("mesh        {} ({id})", mesh.domain));
    output.line(&format!("addresses   {v4}, {v6}"));
    output.line(&format!(
        "world       generation {generation}, epoch {epoch}"
    ));
    output.line(&format!(
        "nodes       {}, {} connected",
        status.nodes, status.connected
    ));
    output.line(&format!("join        {}", status.join));
    output.line(&format!("version     {}", status.version));
    for problem in &status.problems {
        output.line(&format!("problem     {problem}"));
    }
    Ok(())
}
