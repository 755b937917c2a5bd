# Makes of the data of one node of a cluster a node that stands alone, with all that its members of the queues have. It runs in a container without a
# network, where nobody else sees the node.
ulimit -n 65536 2>/dev/null || ulimit -n "$(ulimit -H -n)"
# With Mnesia (4.0): the node does not wait for the others.
rabbitmqctl force_boot
rabbitmq-server &
until rabbitmqctl await_startup --timeout 5; do
  # With Khepri (4.3): it does not wait for most of them. Before it listens, and with Mnesia, this fails.
  rabbitmqctl force_standalone_khepri_boot || kill -0 $!
done
rabbitmqctl eval 'rabbit_quorum_queue:force_all_queues_shrink_member_to_current_member(),
                  [ok = rabbit_db_cluster:forget_member(Node, false) || Node <- rabbit_nodes:list_members() -- [node()]].'
rabbitmqctl stop
wait $!
