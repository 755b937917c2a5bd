% Waits until this node's members of the queues have what the others have confirmed until now; up to five minutes for each queue.
Wait = fun Wait({Name, _}, _, 0) -> throw({behind, Name});
           Wait(Member, Index, Left) ->
               case ra:key_metrics(Member) of
                   #{commit_index := Own} when Own >= Index -> ok;
                   _ -> timer:sleep(1000), Wait(Member, Index, Left - 1)
               end
       end,
Look = fun(Name) ->
           case ra:members({Name, node()}) of
               {ok, _, Leader} -> Wait({Name, node()}, maps:get(commit_index, ra:key_metrics(Leader)), 300);
               _ -> throw({no_member_here, Name})
           end
       end,
[Look(element(1, amqqueue:get_pid(Queue))) || Queue <- rabbit_amqqueue:list_by_type(rabbit_quorum_queue)], ok.
