use super::*;

fn place(variables: &[(&str, &str)], address: Option<&str>) -> Result<Option<Place>> {
    let variables = |name: &str| {
        let found = variables.iter().find(|(own, _)| *own == name);
        found.map(|(_, value)| (*value).to_owned())
    };
    Place::from_environment(&variables, address)
}

fn found(variables: &[(&str, &str)]) -> (usize, usize, usize, String) {
    let Place { rank, ranks, local_rank, address, .. } = place(variables, None).unwrap().unwrap();
    (rank, ranks, local_rank, address)
}

#[test]
fn launchers_are_recognized() {
    let torchrun = [
        ("RANK", "5"),
        ("WORLD_SIZE", "8"),
        ("LOCAL_RANK", "1"),
        ("LOCAL_WORLD_SIZE", "4"),
        ("MASTER_ADDR", "gpu1"),
        ("MASTER_PORT", "29500"),
    ];
    assert_eq!(found(&torchrun), (5, 8, 1, "gpu1:29501".to_owned()));
    let slurm = [
        ("SLURM_PROCID", "3"),
        ("SLURM_STEP_NUM_TASKS", "4"),
        ("SLURM_LOCALID", "1"),
        ("SLURM_STEP_NODELIST", "gpu[07-08]"),
        ("SLURM_JOB_ID", "123"),
        ("SLURM_STEP_ID", "0"),
    ];
    let (rank, ranks, local_rank, address) = found(&slurm);
    assert_eq!((rank, ranks, local_rank), (3, 4, 1));
    assert!(address.starts_with("gpu07:2"), "{address}");
    let own = [("ATOM_RANK", "1"), ("ATOM_RANKS", "2"), ("ATOM_MEET", "127.0.0.1:4000")];
    assert_eq!(found(&own), (1, 2, 1, "127.0.0.1:4000".to_owned()));
    let open_mpi = [
        ("OMPI_COMM_WORLD_RANK", "1"),
        ("OMPI_COMM_WORLD_SIZE", "2"),
        ("OMPI_COMM_WORLD_LOCAL_RANK", "1"),
        ("OMPI_COMM_WORLD_LOCAL_SIZE", "2"),
        ("PMIX_NAMESPACE", "prterun-host-77@1"),
    ];
    assert!(found(&open_mpi).3.starts_with("127.0.0.1:2"));
    let mpich = [("PMI_RANK", "0"), ("PMI_SIZE", "2"), ("MPI_LOCALNRANKS", "2")];
    assert_eq!(found(&mpich).1, 2);
}

#[test]
fn a_process_that_nobody_launched_is_alone() {
    assert_eq!(place(&[], None).unwrap(), None);
    assert_eq!(place(&[("RANK", "0"), ("WORLD_SIZE", "1")], None).unwrap(), None);
    // A batch script that srun did not start.
    let batch = [("SLURM_PROCID", "0"), ("SLURM_NTASKS", "8"), ("SLURM_NODELIST", "gpu1")];
    assert_eq!(place(&batch, None).unwrap(), None);
}

#[test]
fn what_makes_no_sense_is_refused() {
    let message =
        |variables: &[(&str, &str)], address| place(variables, address).unwrap_err().message();
    assert!(message(&[], Some("a:1")).contains("not which rank this is"));
    assert!(message(&[("RANK", "2"), ("WORLD_SIZE", "2")], None).contains("RANK=2 of 2"));
    assert!(message(&[("RANK", "x"), ("WORLD_SIZE", "2")], None).contains("RANK=x"));
    assert!(message(&[("RANK", "0"), ("WORLD_SIZE", "2")], None).contains("MASTER_ADDR"));
    let hosts = [
        ("OMPI_COMM_WORLD_RANK", "1"),
        ("OMPI_COMM_WORLD_SIZE", "4"),
        ("OMPI_COMM_WORLD_LOCAL_SIZE", "2"),
    ];
    assert!(message(&hosts, None).contains("several hosts"));
    assert_eq!(place(&hosts, Some("h:1")).unwrap().unwrap().address, "h:1");
}

#[test]
fn the_first_of_slurms_hosts_is_found() {
    for (nodes, first) in [
        ("gpu1", "gpu1"),
        ("gpu1,gpu2", "gpu1"),
        ("gpu[07-09,12],login1", "gpu07"),
        ("a,b[1-2]", "a"),
        ("rack2-n[3,5]-ib", "rack2-n3-ib"),
    ] {
        assert_eq!(first_node(nodes).as_deref(), Some(first));
    }
    assert_eq!(first_node(""), None);
}
